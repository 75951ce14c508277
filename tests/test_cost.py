"""The cost of a step, in figures that do not depend on the machine's speed.

Memory traffic and memory are measured as slopes: the growth from a small model to a larger one with
the same number of leaves, per byte of additional parameters. The cost of a clipper's history does
not grow with the model and drops out. `benchmarks/bench.py` measures time, and
`benchmarks/program_text.py` reads the figures from compiled programs.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import program_text
import pytest
from clipper_table import CLIPPERS
from compat import lenient
from compilation import JUDGED

import optax_smartclip as smartclip
from optax_smartclip.engine.norms import group_norms, norms_in_range
from optax_smartclip.engine.partitions import Leaves

every_clipper = pytest.mark.parametrize("name", CLIPPERS)

THEIRS = "clip_by_global_norm"
CHAINED = {
    "alone": optax.identity(),
    THEIRS: optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.01),
    "autoclip": smartclip.autoclip(),
    "per_param": smartclip.autoclip(90.0, history=smartclip.ring_buffer(16), scope="per_param"),
    "agc": smartclip.agc(),
}
# Each with `observe_norms` before it.
CHAINED |= {
    f"observed {name}": optax.chain(smartclip.observe_norms(), CHAINED[name])
    for name in ("autoclip", "per_param", THEIRS)
}


def shapes(layers, width):
    return {f"layer{n}": {"kernel": (2 * width, width), "bias": (width,)} for n in range(layers)}


SMALL, LARGE, DEEP = shapes(2, 64), shapes(2, 128), shapes(6, 64)


def arrays(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def size(model):
    return sum(4 * leaf.size for leaf in jax.tree.leaves(arrays(model)))


@functools.cache
def compile_step(name, model_name):
    """A training step without a model: clipper, AdamW and the update of the parameters."""
    params = arrays({"small": SMALL, "large": LARGE, "deep": DEEP}[model_name])
    tx = optax.chain(CHAINED[name], lenient(optax.adamw(1e-3)))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step.lower(params, jax.eval_shape(tx.init, params), params).compile(JUDGED)


def slope(figure, name):
    """The growth of a figure of the compiled step, per byte of parameters."""
    small, large = (figure(compile_step(name, model)) for model in ("small", "large"))
    return (large - small) / (size(LARGE) - size(SMALL))


def first_half(grads):
    return {name: number < len(grads) // 2 for number, name in enumerate(grads)}


# The bytes of the branch that runs.


@pytest.mark.parametrize("name", ["alone", THEIRS, "adaptive_grad_clip"])
def test_bytes_summed_from_the_text_of_a_program_are_those_that_xla_states(name):
    compiled = compile_step(name, "large")
    total = program_text.ProgramText(compiled.as_text()).traffic()
    assert total == pytest.approx(program_text.xla_bytes(compiled), rel=1e-3)


def test_bytes_of_the_usual_branch_are_those_of_norms_without_a_second_branch():
    leaves = jax.tree.leaves(arrays(LARGE))
    partition = Leaves((0,) * len(leaves), 1)

    exact, plain = (
        jax.jit(functools.partial(norms, partition=partition)).lower(leaves).compile(JUDGED)
        for norms in (group_norms, norms_in_range)
    )
    assert program_text.xla_bytes(exact) > 1.5 * program_text.xla_bytes(plain)
    assert program_text.usual_bytes(exact) == pytest.approx(program_text.xla_bytes(plain), rel=1e-2)


def test_bytes_of_a_conditional_are_those_of_its_cheapest_branch():
    array = jax.ShapeDtypeStruct((100, 1000), jnp.float32)

    def choose(number, array):
        return jax.lax.switch(number, [jnp.sum, jnp.max, lambda _: jnp.float32(1.0)], array)

    compiled = jax.jit(choose).lower(0, array).compile(JUDGED)
    assert program_text.xla_bytes(compiled) > 400_000
    assert program_text.usual_bytes(compiled) < 1000


# Memory traffic.


@functools.cache
def bytes_of_their_norm():
    """The traffic of Optax's norm alone, per byte of the gradient."""
    small, large = (
        program_text.xla_bytes(jax.jit(optax.tree.norm).lower(arrays(model)).compile(JUDGED))
        for model in (SMALL, LARGE)
    )
    return (large - small) / (size(LARGE) - size(SMALL))


@pytest.mark.parametrize("name", ["autoclip", "per_param"])
def test_a_step_moves_no_more_than_adamw_and_a_norm(name):
    # In jax 0.10.2: AdamW 10.00, the norm 1.00, both and `clip_by_global_norm` 15.00.
    ours = slope(program_text.usual_bytes, name)
    floor = slope(program_text.usual_bytes, "alone") + bytes_of_their_norm()
    assert floor <= ours <= floor + 0.02
    assert ours < slope(program_text.usual_bytes, THEIRS)


def test_agc_moves_no_more_than_adaptive_grad_clip():
    # The number of units grows as well: their norms are a thousandth of either figure.
    ours, theirs = (slope(program_text.usual_bytes, name) for name in ("agc", "adaptive_grad_clip"))
    assert ours <= 1.01 * theirs


def readers(compiled):
    """The number of operations of the main program that read each leaf of the gradient."""
    text = compiled.as_text()
    main = text[text.index("\nENTRY ") :]
    instructions = re.findall(
        r"^\s+(?:ROOT )?%?([\w.-]+) = (?:\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, |$)",
        main,
        re.MULTILINE,
    )
    inputs = {
        int(operands): name
        for name, operation, operands in instructions
        if operation == "parameter"
    }
    num_leaves = len(jax.tree.leaves(arrays(LARGE)))
    grads = [inputs[number] for number in sorted(inputs)[-num_leaves:]]
    users = collections.Counter(
        operand
        for _, operation, operands in instructions
        # The branch that is taken reads the operands of a conditional.
        if operation not in ("tuple", "conditional")
        for operand in set(re.findall(r"%([\w.-]+)", operands))
    )
    return [users[name] for name in grads]


def test_a_step_reads_each_leaf_of_the_gradient_once_more_than_the_optimizer_does():
    alone, ours, theirs = (
        np.array(readers(compile_step(name, "large"))) for name in ("alone", "autoclip", THEIRS)
    )
    assert np.all(alone >= 1)
    np.testing.assert_array_equal(ours, alone + 1)
    assert np.all(theirs > ours)


@pytest.mark.parametrize("name", ["autoclip", "per_param", THEIRS])
def test_norms_observed_before_a_clipper_need_no_read_of_their_own(name):
    observed = f"observed {name}"
    np.testing.assert_array_equal(
        *(readers(compile_step(label, "large")) for label in (observed, name))
    )
    moved, floor = (slope(program_text.usual_bytes, label) for label in (observed, name))
    assert moved == pytest.approx(floor, abs=1e-3)


def primitives(jaxpr):
    """The operations of a program and of those within it."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(equation.params):
            if hasattr(value, "eqns"):
                yield from primitives(value)


def count_primitives(tx, num_leaves):
    params = arrays({f"leaf{number}": (4, 3) for number in range(num_leaves)})
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
    return collections.Counter(primitives(jaxpr.jaxpr))


def per_leaf(tx):
    few, many = (count_primitives(tx, number) for number in (10, 30))
    return {name: (many[name] - few[name]) / 20 for name in many}


def sums_per_leaf(tx):
    return per_leaf(tx)["reduce_sum"]


@pytest.mark.parametrize(
    ("inner", "again"),
    [
        (smartclip.autoclip(), False),
        (optax.chain(optax.identity(), smartclip.zscore_clip(), optax.sgd(0.1)), False),
        # These need another norm than the wrapper.
        (optax.chain(optax.scale(2.0), smartclip.autoclip()), True),
        (smartclip.autoclip(scope="per_param"), True),
        (
            optax.masked(
                smartclip.autoclip(), lambda grads: {name: name < "leaf5" for name in grads}
            ),
            True,
        ),
    ],
    ids=["clipper", "chain", "scaled", "per_param", "masked"],
)
def test_a_norm_that_skip_spikes_has_computed_is_not_computed_again(inner, again):
    alone = sums_per_leaf(smartclip.skip_spikes(optax.identity()))
    both = sums_per_leaf(smartclip.skip_spikes(inner))
    assert both > alone if again else both == alone


# Memory.


# The second read may hold factors of the size of a leaf. In agc, this is more than the hundredth
# that `adaptive_grad_clip` needs.
@pytest.mark.parametrize("name", ["autoclip", "per_param", "agc"])
def test_a_larger_model_needs_no_more_temporary_memory_than_with_clip_by_global_norm(name):
    # With JAX 0.7, norms of units need more, those of Optax as well.
    others = [THEIRS, "adaptive_grad_clip"] if name == "agc" else [THEIRS]
    ours, *theirs = (slope(program_text.temporary_bytes, label) for label in (name, *others))
    assert ours <= max(theirs) + 0.01


@every_clipper
def test_the_state_has_as_many_arrays_for_three_leaves_as_for_three_hundred(name):
    def kept(num_leaves):
        params = arrays({f"leaf{number}": (4, 3) for number in range(num_leaves)})
        return jax.tree.leaves(jax.eval_shape(CLIPPERS[name]().init, params))

    few, many = kept(3), kept(300)
    assert len(few) == len(many) <= 14
    # Numbers for one group or for each leaf, never a copy of the gradient.
    assert all(leaf.shape[:1] in ((), (1,), (300,)) for leaf in many)


# Programs.

# Operations that sort or leave the device, in StableHLO and in HLO.
FORBIDDEN = (
    "sort",
    "top_k",
    "topk",
    "custom_call",
    "custom-call",
    "infeed",
    "outfeed",
    "send",
    "recv",
)


def forbidden(text):
    operations = set(re.findall(r"(?:stablehlo|chlo)\.(\w+)| ([\w-]+)\(", text))
    return {name for names in operations for name in names if name.startswith(FORBIDDEN)}


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (jnp.sort, "sort"),
        (lambda x: jax.lax.top_k(x, 2)[0], "top_k"),
        (lambda x: jax.pure_callback(np.sin, x, x), "custom_call"),
    ],
    ids=["sort", "top_k", "callback"],
)
def test_forbidden_operations_are_found(function, found):
    lowered = jax.jit(function).lower(jnp.ones(4))
    assert found in forbidden(lowered.as_text())
    assert forbidden(lowered.compile(JUDGED).as_text())


@every_clipper
def test_an_update_does_not_sort_or_leave_the_device_and_has_no_loop_on_an_accelerator(name):
    tx = CLIPPERS[name]()
    params = arrays(SMALL)
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params), params)
    on_cpu, on_gpu, on_tpu = (
        traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    )
    assert not forbidden(on_cpu)
    for text in (on_gpu, on_tpu):
        assert not forbidden(text)
        # A loop may wait for the host after each iteration.
        assert "stablehlo.while" not in text


@pytest.mark.parametrize("name", ["autoclip", "per_param", "agc"])
def test_the_compiled_step_does_not_sort_or_leave_the_device(name):
    assert not forbidden(compile_step(name, "small").as_text())


def lines_per_leaf(name):
    few, many = (
        len(compile_step(name, model).as_text().splitlines()) for model in ("small", "deep")
    )
    return (many - few) / 8


@pytest.mark.parametrize("name", ["autoclip", "per_param"])
def test_a_leaf_adds_less_than_twice_the_lines_that_it_adds_to_the_program_of_optax(name):
    # The time of compilation grows with the length.
    assert lines_per_leaf(name) < 2 * lines_per_leaf(THEIRS)


@pytest.mark.parametrize("name", ["autoclip", "per_param"])
def test_the_loop_over_small_leaves_is_not_compiled_as_one_kernel(name):
    # XLA of JAX 0.12 marks such a kernel so, and LLVM unrolls all sums in it.
    grads = {str(number): jax.ShapeDtypeStruct((8, 8), jnp.float32) for number in range(4)}
    tx = CHAINED[name]
    step = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, grads), grads).compile(JUDGED)
    assert "xla_cpu_small_call" not in step.as_text()
