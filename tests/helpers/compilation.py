"""How the tests compile: quickly, or as JAX does by itself where the program is what is judged.

A third of the time of `make test` would be spent on fast machine code that runs for a moment. XLA's
own passes are the same; only LLVM optimizes less. `make test-long` compiles as JAX does by itself.
"""

# Option of XLA: its value for quick compilation, and its default.
OPTIONS = {"xla_backend_optimization_level": (0, 3)}
QUICKLY = " ".join(f"--{name}={quick}" for name, (quick, _) in OPTIONS.items())
BY_DEFAULT = {name: default for name, (_, default) in OPTIONS.items()}
