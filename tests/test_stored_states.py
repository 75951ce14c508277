"""States that were saved by earlier versions go on in this one as they did then.

`helpers/stored_states.py` has written them, a folder for each version.
"""

import json
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import stored_states
from clipper_table import CLIPPERS
from documents import ROOT

import optax_smartclip as smartclip

VERSIONS = sorted(stored_states.FOLDER.glob("v*"))
STORED = [
    pytest.param(version, path.stem, id=f"{version.name}-{path.stem}")
    for version in VERSIONS
    for path in sorted(version.glob("*.msgpack"))
]
# Version 0.1.0 reported one unit of `agc`, and whether it was clipped. Nothing depends on it.
AGC_THEN = {"last/clipped": "bool[]"}
AGC_REPORTED = ("grad_norm", "clip_threshold", "clip_scale", "clipped")
# It learned from a gradient of zero. Only the steps before the one at this place are the same.
ZERO_STEP = {"v0.1.0": 5}
every_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda version: version.name)
every_state = pytest.mark.parametrize(("version", "name"), STORED)


def load(path):
    return json.loads(path.read_text())


def arrays(tree):
    """Lists of JSON as arrays: single precision, unless they are counts or truth values."""

    def array(value):
        value = np.array(value)
        return value.astype(np.float32) if value.dtype == np.float64 else value

    return jax.tree.map(array, tree, is_leaf=lambda node: isinstance(node, list))


def stream(version):
    """Parameters, and gradients and losses of the next steps."""
    stored = arrays(load(version / "stream.json"))
    return stored["params"], stored["grads"], stored["losses"]


def check_layout(what, today, stored):
    """Raises AssertionError with every leaf of a state that has another name, dtype or shape."""
    changes = [
        f"{path}: {stored.get(path, 'not')} in the checkpoint, {today.get(path, 'not')} today"
        for path in sorted({*today, *stored})
        if today.get(path) != stored.get(path)
    ]
    assert not changes, f"A checkpoint of {what} cannot be restored.\n" + "\n".join(changes)


@every_state
def test_a_stored_state_goes_on_as_it_did_when_it_was_stored(version, name):
    params, grads, losses = stream(version)
    stored = load(version / f"{name}.json")
    tx = stored_states.clippers(version.name)[name]()
    target = tx.init(params)
    layout = stored_states.layout(target) | (AGC_THEN if name == "agc" else {})
    check_layout(f"{name} of {version.name}", layout, stored["layout"])

    data = (version / f"{name}.msgpack").read_bytes()
    state = flax.serialization.from_bytes(target, data)
    _, steps = stored_states.follow(tx, state, params, grads, losses)
    end = ZERO_STEP.get(version.name)

    expected = {key: arrays(stored[key]) for key in ("updates", "metrics")}
    assert jax.tree.structure(steps) == jax.tree.structure(expected)
    for path, wanted in jax.tree_util.tree_flatten_with_path(expected)[0]:
        if name == "agc" and path[-1].key in AGC_REPORTED:
            continue
        actual = steps
        for key in path:
            actual = actual[key.key]
        actual, wanted = np.asarray(actual)[:end], wanted[:end]
        if path[-1].key == "clip_threshold":
            # The threshold of a step without a norm is reported and not used.
            judged = np.isfinite(expected["metrics"]["grad_norm"])[:end]
            actual, wanted = actual[judged], wanted[judged]
        # Counts and truth values have to be equal; rounding may differ between machines.
        if wanted.dtype == np.float32:
            if path[0].key == "metrics":
                # Version 0.1.0 reported NaN and Inf as they were.
                wanted = reference.reported(wanted)
            np.testing.assert_allclose(actual, wanted, rtol=1e-6, err_msg=str(path))
        else:
            np.testing.assert_array_equal(actual, wanted, err_msg=str(path))


@every_version
def test_stored_runs_contain_clipped_and_bad_steps(version):
    for name in {path.stem for path in version.glob("*.msgpack")}:
        metrics = arrays(load(version / f"{name}.json"))["metrics"]
        assert np.all(metrics["num_steps"][0] > 20), name
        assert np.any(metrics["clipped"]), name
        assert np.any(metrics["num_nonfinite"] > 0) or np.any(metrics.get("num_skipped", 0)), name


@every_version
def test_states_of_clippers_with_defaults_have_the_shapes_they_had(version):
    today = stored_states.default_layouts(stream(version)[0])
    called_today = stored_states.CALLED_TODAY.get(version.name, {})
    for name, stored in load(version / "defaults.json").items():
        layout = today[called_today.get(name, name)] | (AGC_THEN if name == "agc()" else {})
        check_layout(f"{name} of {version.name}", layout, stored)


def test_a_state_has_as_many_bytes_as_the_page_of_promises_says():
    page = (ROOT / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| `(.+)` \| ([\d,]+) \|", page, re.MULTILINE)
    states = {
        name: jax.eval_shape(make().init, {"w": jnp.ones(1000)})
        for name, make in stored_states.DEFAULTS.items()
    }
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        for name, state in states.items()
    }
    assert {name: int(size.replace(",", "")) for name, size in rows} == sizes


def test_this_version_has_stored_a_state_of_every_clipper():
    version = f"v{smartclip.__version__}"
    folder = stored_states.FOLDER / version
    assert folder in VERSIONS, "Run: python tests/helpers/stored_states.py"
    stored = {path.stem for path in folder.glob("*.msgpack")}
    assert stored == stored_states.clippers(version).keys()


def test_a_new_version_stores_a_state_of_every_clipper(tmp_path, monkeypatch):
    folder = tmp_path / "v99.0.0"
    assert stored_states.clippers(folder.name).keys() > CLIPPERS.keys()
    monkeypatch.setattr(stored_states, "FOLDER", tmp_path)
    monkeypatch.setattr(smartclip, "__version__", "99.0.0")
    monkeypatch.setattr(stored_states, "CLIPPERS", {"zscore_clip": smartclip.zscore_clip})
    monkeypatch.setattr(stored_states, "SKIP_SPIKES", {})
    stored_states.main([])
    assert {path.stem for path in folder.glob("*.msgpack")} == {"autoclip_fading", "zscore_clip"}
    for name in ("autoclip_fading", "zscore_clip"):
        test_a_stored_state_goes_on_as_it_did_when_it_was_stored(folder, name)


def test_a_folder_that_exists_is_not_written_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored_states, "FOLDER", tmp_path)
    folder = tmp_path / f"v{smartclip.__version__}"
    folder.mkdir()
    with pytest.raises(SystemExit, match="1"):
        stored_states.main([])
    assert "say --again" in capsys.readouterr().err
    assert not any(folder.iterdir())


def test_a_leaf_with_another_name_or_shape_is_named():
    stored = {"rule/ring": "float32[1, 16]", "num_observed": "int32[1]"}
    check_layout("it", dict(stored), stored)
    with pytest.raises(
        AssertionError, match=r"num_observed: int32\[1\] in the checkpoint, not today"
    ):
        check_layout("it", {"rule/ring": "float32[1, 16]", "num_seen": "int32[1]"}, stored)
    with pytest.raises(AssertionError, match=r"rule/ring: .* 16\] in the .* 32\] today"):
        check_layout("it", {**stored, "rule/ring": "float32[1, 32]"}, stored)
