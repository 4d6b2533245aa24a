// A CUDA driver whose card is this machine's CPU. Kernels are shared libraries (made by plugin.py); everything is done
// when it is queued, but what a stream captures, which a graph does whenever it is launched. Memory of the card is
// memory of the process, handed out poisoned; copies beyond what was allocated are refused.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "entry.h"

namespace {

enum Result { kDone = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kInvalidContext = 201,
              kNotFound = 500, kCaptureUnsupported = 900, kUpdateFailure = 910 };

const size_t kTotal = size_t{4} << 30;
const int kMultiprocessors = 4, kShared = 227 << 10;

double now_ms() {
    using namespace std::chrono;
    return duration<double, std::milli>(steady_clock::now().time_since_epoch()).count();
}

struct Module {
    void* library;
    std::vector<Entry> entries;
    std::vector<uintptr_t> globals;  // that were asked for
};

struct Launch {
    const Entry* entry;
    unsigned grid[3], threads;
    std::vector<std::vector<char>> arguments;
    void run() {
        std::vector<void*> pointers;
        for (auto& argument : arguments) pointers.push_back(argument.data());
        const double start = now_ms();
        entry->run(pointers.data(), grid[0], grid[1], grid[2], threads);
        if (std::getenv("CPU_CARD_TRACE")) {
            std::fprintf(stderr, "%s: %u x %u x %u blocks of %u threads, %.1f ms\n", entry->name, grid[0], grid[1],
                         grid[2], threads, now_ms() - start);
        }
    }
};

struct Work {
    const void* kind;  // of what it is: a graph takes over only work of the same kind
    std::function<void()> run;
};
struct Graph { std::vector<Work> work; };
struct Stream { Graph* captured = nullptr; };
struct Event { double at = 0; };
struct Context {} context;

std::mutex lock;
std::map<uintptr_t, size_t> allocated;  // of the card
size_t used = 0;
thread_local Context* current = nullptr;

bool is_on_card(uintptr_t first, size_t bytes) {
    std::lock_guard<std::mutex> held(lock);
    auto after = allocated.upper_bound(first);
    if (after == allocated.begin()) return false;
    --after;
    return first + bytes <= after->first + after->second;
}

Result queue(Stream* stream, const void* kind, std::function<void()> run) {
    if (!current) return kInvalidContext;
    if (stream->captured) stream->captured->work.push_back({kind, std::move(run)});
    else run();
    return kDone;
}

Result init(unsigned) { return kDone; }
Result driver_version(int* version) { return *version = 13000, kDone; }
Result device_count(int* count) { return *count = 1, kDone; }
Result device_get(int* device, int) { return *device = 0, kDone; }
Result device_name(char* name, int size, int) { return std::strncpy(name, "the CPU as a card", size), kDone; }
Result device_uuid(char* uuid, int) { return std::memset(uuid, 7, 16), kDone; }
Result device_memory(size_t* bytes, int) { return *bytes = kTotal, kDone; }

Result device_attribute(int* value, int attribute, int) {
    const char* capability = std::getenv("CPU_CARD_CAPABILITY");
    const int known[][2] = {
        {75, capability ? capability[0] - '0' : 8}, {76, capability ? capability[2] - '0' : 0},
        {16, kMultiprocessors}, {38, 1 << 20},  // the L2 cache
        {97, kShared}, {81, 228 << 10}, {82, 1 << 16}, {39, 2048}, {106, 32},  // a multiprocessor's limits
        {13, 1000000}, {36, 1000000}, {37, 64}, {40, 1}, {95, 1}, {99, 1}, {113, 1}};
    *value = 0;
    for (auto [number, answer] : known) if (number == attribute) *value = answer;
    return kDone;
}

Result retain(Context** found, int) { return *found = &context, kDone; }
Result release(int) { return kDone; }
Result set_current(Context* wanted) { return current = wanted, kDone; }
Result synchronize() { return current ? kDone : kInvalidContext; }

Result memory_info(size_t* free, size_t* total) {
    std::lock_guard<std::mutex> held(lock);
    return *total = kTotal, *free = kTotal - used, kDone;
}
Result allocate(uintptr_t* address, size_t bytes) {
    if (!current) return kInvalidContext;
    std::lock_guard<std::mutex> held(lock);
    if (bytes > kTotal - used) return kOutOfMemory;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return kOutOfMemory;
    if (bytes <= size_t{64} << 20) std::memset(memory, 0xff, bytes);  // no numbers
    used += bytes;
    allocated[*address = reinterpret_cast<uintptr_t>(memory)] = bytes;
    return kDone;
}
Result free_memory(uintptr_t address) {
    std::lock_guard<std::mutex> held(lock);
    const auto found = allocated.find(address);
    if (found == allocated.end()) return kInvalidValue;
    munmap(reinterpret_cast<void*>(address), found->second);
    used -= found->second;
    allocated.erase(found);
    return kDone;
}
Result allocate_host(void** address, size_t bytes, unsigned) {
    return *address = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096), kDone;
}
Result free_host(void* address) { return std::free(address), kDone; }
Result register_host(void*, size_t, unsigned) { return kDone; }
Result unregister_host(void*) { return kDone; }
Result device_pointer(void** mapped, void* address, unsigned) { return *mapped = address, kDone; }

Result copy(void* to, const void* from, size_t bytes, Stream* stream) {
    return queue(stream, reinterpret_cast<const void*>(&copy), [=] { std::memmove(to, from, bytes); });
}
Result copy_in(uintptr_t to, const void* from, size_t bytes, Stream* stream) {
    if (!is_on_card(to, bytes)) return kInvalidValue;
    return copy(reinterpret_cast<void*>(to), from, bytes, stream);
}
Result copy_out(void* to, uintptr_t from, size_t bytes, Stream* stream) {
    if (!is_on_card(from, bytes)) return kInvalidValue;
    return copy(to, reinterpret_cast<const void*>(from), bytes, stream);
}
Result copy_within(uintptr_t to, uintptr_t from, size_t bytes, Stream* stream) {
    if (!is_on_card(to, bytes) || !is_on_card(from, bytes)) return kInvalidValue;
    return copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, stream);
}
template <class T>
Result set(uintptr_t to, T value, size_t count, Stream* stream) {
    if (!is_on_card(to, count * sizeof value) || to % sizeof value) return kInvalidValue;
    T* memory = reinterpret_cast<T*>(to);
    return queue(stream, reinterpret_cast<const void*>(&set<T>), [=] { std::fill(memory, memory + count, value); });
}

Result new_stream(Stream** stream, unsigned, int) { return *stream = new Stream, kDone; }
Result destroy_stream(Stream* stream) { return delete stream, kDone; }
Result synchronize_stream(Stream* stream) { return stream->captured ? kCaptureUnsupported : kDone; }
Result new_event(Event** event, unsigned) { return *event = new Event, kDone; }
Result destroy_event(Event* event) { return delete event, kDone; }
Result record_event(Event* event, Stream*) { return event->at = now_ms(), kDone; }
Result passed_event(Event*) { return kDone; }
Result wait_event(Stream*, Event*, unsigned) { return kDone; }
Result elapsed(float* ms, Event* start, Event* end) { return *ms = static_cast<float>(end->at - start->at), kDone; }

Result load_module(Module** made, const char* image) {
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(image);
    if (std::memcmp(image, ELFMAG, SELFMAG)) return kInvalidImage;
    const size_t bytes = header->e_shoff + size_t{header->e_shnum} * header->e_shentsize;
    char name[] = "/tmp/cpu-card-XXXXXX";  // a name for each: a library of a name that is loaded is not loaded again
    const int file = mkstemp(name);
    const bool written = file >= 0 && write(file, image, bytes) == static_cast<ssize_t>(bytes);
    if (file >= 0) close(file);
    void* library = written ? dlopen(name, RTLD_NOW | RTLD_LOCAL) : nullptr;
    unlink(name);
    if (!library) return kInvalidImage;
    const auto* entries = static_cast<const Entry*>(dlsym(library, "cpu_card_kernels"));
    if (!entries) return kInvalidImage;
    *made = new Module{library, {}, {}};
    for (; entries->name; ++entries) (*made)->entries.push_back(*entries);
    return kDone;
}
Result unload_module(Module* module) {
    std::lock_guard<std::mutex> held(lock);
    for (const uintptr_t global : module->globals) allocated.erase(global);
    dlclose(module->library);
    return delete module, kDone;
}
Result get_function(const Entry** found, Module* module, const char* name) {
    for (const Entry& entry : module->entries) {
        if (!std::strcmp(entry.name, name)) return *found = &entry, kDone;
    }
    return kNotFound;
}
Result get_global(uintptr_t* address, size_t* bytes, Module* module, const char* name) {
    void* found = dlsym(module->library, name);
    Dl_info library;
    ElfW(Sym)* symbol;
    if (!found || !dladdr1(found, &library, reinterpret_cast<void**>(&symbol), RTLD_DL_SYMENT)) return kNotFound;
    std::lock_guard<std::mutex> held(lock);
    module->globals.push_back(*address = reinterpret_cast<uintptr_t>(found));
    return allocated[*address] = *bytes = symbol->st_size, kDone;
}
Result function_attribute(int* value, int attribute, const Entry*) { return *value = attribute ? 32 : 1024, kDone; }
Result set_function_attribute(const Entry*, int, int) { return kDone; }
Result occupancy(int* blocks, const Entry*, int, size_t) { return *blocks = 2, kDone; }
Result parameter_info(const Entry* entry, size_t index, size_t* offset, size_t* bytes) {
    if (index >= entry->count) return kInvalidValue;
    return *offset = 0, *bytes = entry->sizes[index], kDone;
}

// CUlaunchConfig of cuda.h.
struct Config {
    unsigned grid[3], block[3], shared;
    Stream* stream;
    const void* attributes;
    unsigned count;
};
Result launch(const Config* config, const Entry* entry, void** arguments, void**) {
    const unsigned* block = config->block;
    if (block[1] * block[2] != 1 || block[0] > 1024 || !config->grid[0] || config->grid[1] > 65535 ||
        config->grid[2] > 65535 || config->shared > kShared) return kInvalidValue;
    Launch made{entry, {config->grid[0], config->grid[1], config->grid[2]}, block[0], {}};
    for (unsigned i = 0; i < entry->count; ++i) {
        const auto* first = static_cast<const char*>(arguments[i]);
        made.arguments.emplace_back(first, first + entry->sizes[i]);
    }
    return queue(config->stream, entry, [made]() mutable { made.run(); });
}

Result begin_capture(Stream* stream, int) { return stream->captured = new Graph, kDone; }
Result capture_status(Stream* stream, int* status) { return *status = stream->captured ? 1 : 0, kDone; }
Result end_capture(Stream* stream, Graph** graph) {
    return *graph = stream->captured, stream->captured = nullptr, kDone;
}
Result graph_nodes(Graph* graph, void**, size_t* count) { return *count = graph->work.size(), kDone; }
Result destroy_graph(Graph* graph) { return delete graph, kDone; }
Result instantiate(Graph** executable, Graph* graph, unsigned long long) {
    return *executable = new Graph(*graph), kDone;
}
Result update_graph(Graph* executable, Graph* graph, void*) {
    if (executable->work.size() != graph->work.size()) return kUpdateFailure;
    for (size_t i = 0; i < graph->work.size(); ++i) {
        if (executable->work[i].kind != graph->work[i].kind) return kUpdateFailure;
    }
    return executable->work = graph->work, kDone;
}
Result launch_graph(Graph* executable, Stream* stream) {
    for (Work& work : executable->work) if (const Result result = queue(stream, work.kind, work.run)) return result;
    return kDone;
}
Result upload_graph(Graph*, Stream*) { return kDone; }

Result error_name(int, const char** text) { return *text = "CUDA_ERROR_OF_THE_CPU_CARD", kDone; }
Result error_text(int, const char** text) { return *text = "the CPU as a card refuses this", kDone; }

template <class F>
void* any(F* function) { return reinterpret_cast<void*>(function); }

const std::map<std::string, void*> functions = {
    {"cuInit", any(init)}, {"cuDriverGetVersion", any(driver_version)}, {"cuDeviceGetCount", any(device_count)},
    {"cuDeviceGet", any(device_get)}, {"cuDeviceGetName", any(device_name)}, {"cuDeviceGetUuid", any(device_uuid)},
    {"cuDeviceGetAttribute", any(device_attribute)}, {"cuDeviceTotalMem", any(device_memory)},
    {"cuDevicePrimaryCtxRetain", any(retain)}, {"cuDevicePrimaryCtxRelease", any(release)},
    {"cuCtxSetCurrent", any(set_current)}, {"cuCtxSynchronize", any(synchronize)}, {"cuMemGetInfo", any(memory_info)},
    {"cuMemAlloc", any(allocate)}, {"cuMemFree", any(free_memory)}, {"cuMemHostAlloc", any(allocate_host)},
    {"cuMemFreeHost", any(free_host)}, {"cuMemHostRegister", any(register_host)},
    {"cuMemHostUnregister", any(unregister_host)}, {"cuMemHostGetDevicePointer", any(device_pointer)},
    {"cuMemcpyHtoDAsync", any(copy_in)}, {"cuMemcpyDtoHAsync", any(copy_out)}, {"cuMemcpyDtoDAsync", any(copy_within)},
    {"cuMemsetD8Async", any(set<uint8_t>)}, {"cuMemsetD32Async", any(set<uint32_t>)},
    {"cuStreamCreateWithPriority", any(new_stream)}, {"cuStreamDestroy", any(destroy_stream)},
    {"cuStreamSynchronize", any(synchronize_stream)}, {"cuStreamQuery", any(synchronize_stream)},
    {"cuStreamWaitEvent", any(wait_event)}, {"cuEventCreate", any(new_event)}, {"cuEventDestroy", any(destroy_event)},
    {"cuEventRecord", any(record_event)}, {"cuEventSynchronize", any(passed_event)}, {"cuEventQuery", any(passed_event)},
    {"cuEventElapsedTime", any(elapsed)}, {"cuModuleLoadData", any(load_module)}, {"cuModuleUnload", any(unload_module)},
    {"cuModuleGetFunction", any(get_function)}, {"cuModuleGetGlobal", any(get_global)},
    {"cuFuncGetAttribute", any(function_attribute)}, {"cuFuncSetAttribute", any(set_function_attribute)},
    {"cuFuncGetParamInfo", any(parameter_info)}, {"cuOccupancyMaxActiveBlocksPerMultiprocessor", any(occupancy)},
    {"cuLaunchKernelEx", any(launch)}, {"cuStreamBeginCapture", any(begin_capture)},
    {"cuStreamEndCapture", any(end_capture)}, {"cuStreamIsCapturing", any(capture_status)}, {"cuGraphGetNodes", any(graph_nodes)},
    {"cuGraphDestroy", any(destroy_graph)}, {"cuGraphExecDestroy", any(destroy_graph)},
    {"cuGraphInstantiate", any(instantiate)}, {"cuGraphInstantiateWithFlags", any(instantiate)},
    {"cuGraphExecUpdate", any(update_graph)}, {"cuGraphLaunch", any(launch_graph)}, {"cuGraphUpload", any(upload_graph)},
    {"cuGetErrorName", any(error_name)}, {"cuGetErrorString", any(error_text)}};

}  // namespace

extern "C" int cuInit(unsigned flags) { return init(flags); }

extern "C" int cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
    if (status) *status = 0;
    if (std::string(name) == "cuGetProcAddress") return *function = any(cuGetProcAddress_v2), kDone;
    const auto found = functions.find(name);
    *function = found == functions.end() ? nullptr : found->second;
    if (status && !*function) *status = 1;
    return *function ? kDone : kNotFound;
}
extern "C" int cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
