"""The figures of a program, counted by hand, and their plots."""

import json

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

from optax_smartclip.memory import analyze_graph, capture_graph_jaxpr, summarize_frontier

mpl.use("Agg")
import matplotlib.pyplot as plt


def waves(x):
    return jnp.sum(jnp.sin(x) * jnp.cos(x))


@pytest.fixture
def report():
    return summarize_frontier(capture_graph_jaxpr(waves, (np.ones(8, np.float32),)))


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_graph_lists_the_nodes_that_run():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    def fn(x):
        y = inner(x)
        jnp.exp(y)
        return jax.nn.relu(y) @ jnp.ones((4, 3))

    graph = capture_graph_jaxpr(fn, (jax.ShapeDtypeStruct((2, 4), jnp.float32),))
    # The call is inlined, the rule of relu is kept, and unused results are left out.
    names = [node.primitive for node in graph.nodes if node.primitive != "broadcast_in_dim"]
    assert names == ["sin", "custom_jvp_call", "dot_general"]
    assert graph.nodes[0].bytes == 32
    assert graph.nodes[-1].flops == 2 * 2 * 3 * 4


def test_frontier_of_a_program_counted_by_hand(report):
    np.testing.assert_array_equal(report.live_bytes, [32, 64, 32, 4])
    assert (report.peak_bytes, report.peak_node, report.peak_primitive) == (64, 1, "cos")
    assert (report.total_bytes, report.lower_bound) == (100, 64)
    assert (report.argument_bytes, report.const_bytes, report.result_bytes) == (32, 0, 4)
    assert "peak 64 bytes after node 1 (cos)" in str(report)


def test_figures_can_be_written_as_json(report):
    figures = json.loads(
        json.dumps(analyze_graph(capture_graph_jaxpr(waves, (np.ones(8, np.float32),))))
    )
    assert figures["peak_bytes"] == report.peak_bytes
    assert figures["frontier_gap"] == 1.0
    assert figures["primitives"] == {"sin": 1, "cos": 1, "mul": 1, "reduce_sum": 1}


def test_the_frontier_gap_compares_the_peak_with_the_lower_bound():
    def wide(x):
        large = [jnp.broadcast_to(x[i], (8,)) for i in range(3)]
        return jnp.sum(large[0]) + jnp.sum(large[1]) + jnp.sum(large[2])

    figures = analyze_graph(capture_graph_jaxpr(wide, (jnp.ones(3),)))
    # Three rows at once; one row and two sums would be enough.
    assert figures["lower_bound"] == 32
    assert 96 <= figures["peak_bytes"] <= 104
    assert figures["frontier_gap"] == figures["peak_bytes"] / 32


def test_program_without_nodes_has_a_report_and_a_plot():
    report = summarize_frontier(capture_graph_jaxpr(lambda x: x, (np.ones(8, np.float32),)))
    assert (report.peak_bytes, report.peak_node) == (0, -1)
    assert "0 nodes" in str(report)
    report.plot()


def test_plot_draws_the_values_of_the_report(report):
    _, given = plt.subplots()
    ax = report.plot(ax=given)
    assert ax is given
    live, peak, bound = ax.get_lines()
    np.testing.assert_array_equal(live.get_xdata(), [0, 1, 2, 3])
    np.testing.assert_array_equal(live.get_ydata(), report.live_bytes)
    np.testing.assert_array_equal(peak.get_xydata(), [[1, 64]])
    np.testing.assert_array_equal(bound.get_ydata(), [64, 64])
    assert ax.get_xlabel() == "node of the forward pass"
    assert ax.get_ylabel() == "live memory (bytes)"
    assert len(ax.get_legend().get_texts()) == 3


def test_plot_makes_a_new_figure(report):
    first, second = report.plot(), report.plot()
    assert first.figure is not second.figure


# The code of the guide that names these functions; only the root of the imports differs.
GUIDE = {
    "capture": """
import jax
import jax.numpy as jnp
from optax_smartclip.memory.integration.jax import capture_graph_jaxpr

def f(x):
    hidden = jnp.sin(x)
    return jnp.tanh(hidden @ jnp.ones((x.shape[-1], 3)))

x = jnp.ones((2, 4))
graph = capture_graph_jaxpr(f, example_inputs=(x,))
print(len(graph.nodes), "nodes captured")
""",
    "gradient": """
import jax.numpy as jnp
from optax_smartclip.memory.integration.jax import height_compressed_grad

def loss_fn(params):
    w, b = params
    hidden = jnp.tanh(jnp.dot(w, b))
    return jnp.sum(hidden**2)

hc_grad = height_compressed_grad(loss_fn, block_size=16)
params = (
    jnp.ones((8, 8)),
    jnp.ones((8,)),
)
grads = hc_grad(params)
executor = hc_grad.last_executor  # inspect the planned schedule
""",
    "plan": """
report = executor.checkpoint_plan.meta
print("Block size:", report["block_size"])
print("Peak frontier (bytes):", report["peak_frontier"])
""",
    "analysis": """
from optax_smartclip.memory.analysis import analyze_graph, summarize_frontier
figures, frontier = analyze_graph(graph), summarize_frontier(graph)
""",
}


def test_the_guide_of_the_wrapper_runs_as_written(capsys):
    program = {}
    for code in GUIDE.values():
        exec(code, program)
    printed = capsys.readouterr().out.splitlines()
    # jnp.ones is one node, or two in older versions of JAX. The others are sin, dot and tanh.
    assert printed[0] in ("4 nodes captured", "5 nodes captured")
    assert printed[1:] == ["Block size: 16", "Peak frontier (bytes): 32"]
    expected = jax.jit(jax.grad(program["loss_fn"]))(program["params"])
    for grad, plain in zip(program["grads"], expected, strict=True):
        np.testing.assert_allclose(grad, plain, rtol=1e-5)
    assert program["frontier"].peak_bytes == program["figures"]["peak_bytes"]
