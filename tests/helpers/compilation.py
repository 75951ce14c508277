"""How the tests compile: quickly, or with JAX's defaults where they judge the compiled program.

With the defaults, most of the CPU time of `make test` would go into machine code that runs for a
moment. XLA's own passes stay the same. The quick options make LLVM optimize less, generate
the code of fusions directly and not by way of MLIR, and hand LLVM one module and not up to 32.
`make test-long` compiles with the defaults.
"""

import jax

# Option of XLA: its value for quick compilation, and its default.
OPTIONS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_cpu_parallel_codegen_split_count": (1, 32),
}
EMITTERS = "xla_cpu_use_fusion_emitters"
# Later versions of XLA may not know the option, and XLA aborts on an unknown one.
if jax.__version_info__ < (0, 11):
    OPTIONS[EMITTERS] = (False, True)

QUICKLY = " ".join(f"--{name}={quick}".lower() for name, (quick, _) in OPTIONS.items())
BY_DEFAULT = {name: default for name, (_, default) in OPTIONS.items()}

# Of these options, only the emitters of fusions change the optimized program, its memory and its
# traffic. LLVM is as quick as in the other tests.
JUDGED = {
    name: default if name == EMITTERS else quick for name, (quick, default) in OPTIONS.items()
}
