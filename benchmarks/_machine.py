"""What one core of the reference machine can do, for physical bounds: measured once, the same in every benchmark.

AVX-512 with VNNI and BF16, 32 MB of shared L3.  Operations count multiplications and additions; bytes are those of a
stream that is read.
"""

from __future__ import annotations

# Operations a second of a matrix product.
FLOAT32_OPS, BFLOAT16_OPS, INT8_OPS = 94e9, 414e9, 860e9
# Bytes a second from memory, the shared cache, and a core's own.
DRAM_BYTES, L3_BYTES, L2_BYTES = 34e9, 97e9, 210e9
# Two 512-bit multiply-adds a cycle at 3.6 GHz: the limit of kernels that are no dense product.
VECTOR_OPS = 230e9
