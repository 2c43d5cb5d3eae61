"""Bytes of an element of the dtypes of weights, by the names of NumPy, torch and MindSpore."""

WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
