"""The loader of Hugging Face folders: weights in safetensors, shown under GGUF's names. See `loader.open_folder`."""
