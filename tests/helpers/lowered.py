"""Programs as JAX lowers them for a platform, which need not be there."""

import jax


def lowered_for(platform, function, *args):
    """The program of a function for `"cpu"`, `"cuda"` or `"tpu"`."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))
    return lowered.compiler_ir("stablehlo").operation


def operations(root, name):
    """All operations of this name in an MLIR operation."""
    for region in root.regions:
        for block in region.blocks:
            for each in block.operations:
                if each.operation.name == name:
                    yield each.operation
                yield from operations(each.operation, name)


def conditionals(root):
    """Conditionals on a value. JAX writes others on the platform, whose operand is constant."""
    for case in operations(root, "stablehlo.case"):
        if len(case.regions) > 1 and case.operands[0].owner.name != "stablehlo.constant":
            yield case
