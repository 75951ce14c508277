"""How the tests compile: quickly, or as JAX does by default where a test judges the program.

The tests compile thousands of programs and run most of them for a moment. With these options, XLA
writes plainer kernels and LLVM optimizes them less, which takes a third of the time. The passes
over a whole program are the same. `make test-long` compiles as JAX does by default.
"""

# Option of XLA: its value for quick compilation, and its default.
OPTIONS = {"xla_backend_optimization_level": (0, 3), "xla_cpu_use_fusion_emitters": (False, True)}
QUICKLY = " ".join(f"--{name}={quick}" for name, (quick, _) in OPTIONS.items())
BY_DEFAULT = {name: default for name, (_, default) in OPTIONS.items()}
