"""How the tests compile: quickly, or with JAX's defaults where they judge the compiled program.

With the defaults, most of the CPU time of `make test` would go into machine code that runs for a
moment. XLA's own passes stay the same. The quick options make LLVM optimize less, generate
the code of fusions directly and not by way of MLIR, and hand LLVM one module and not up to 32.
`make test-long` compiles with the defaults.
"""

import jax

OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
# Of these options, only the emitters of fusions change the optimized program, its memory and its
# traffic: programs that are judged have the usual ones. Later versions of XLA may not know the
# option, and XLA aborts on an unknown one.
JUDGED = {}
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
    JUDGED["xla_cpu_use_fusion_emitters"] = True

QUICKLY = " ".join(f"--{name}={value}".lower() for name, value in OPTIONS.items())
