// What a library of kernels tells the driver of each of them.
#pragma once

struct Entry {
    const char* name;
    void (*run)(void** arguments, unsigned x, unsigned y, unsigned z, unsigned threads);
    const unsigned* sizes;  // of the arguments, bytes
    unsigned count;
};
