"""Files and folders of weights as tensors: safetensors, .ckpt, .bin, folders of ranks."""
