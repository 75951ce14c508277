"""The models of the benchmarks, as trees of shapes without computations."""

from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def gpt(layers: int, width: int, vocabulary: int) -> Tree:
    """Shapes of a GPT-2."""

    def norm() -> Tree:
        return {"scale": (width,), "bias": (width,)}

    def dense(inputs: int, outputs: int) -> Tree:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    blocks = {
        f"block{number:02d}": {
            "norm1": norm(),
            "qkv": dense(width, 3 * width),
            "out": dense(width, width),
            "norm2": norm(),
            "up": dense(width, 4 * width),
            "down": dense(4 * width, width),
        }
        for number in range(layers)
    }
    return {"tokens": (vocabulary, width), "places": (1024, width), "norm": norm(), **blocks}


def plain_gpt(layers: int, width: int, vocabulary: int) -> Tree:
    """Shapes of a modern GPT, with 8 leaves for each layer.

    It has norms before and after each part of a block, and neither biases nor learned positions.
    """
    blocks = {
        f"block{number:02d}": {
            **{f"norm{place}": {"scale": (width,)} for place in range(1, 5)},
            "qkv": {"kernel": (width, 3 * width)},
            "out": {"kernel": (width, width)},
            "up": {"kernel": (width, 4 * width)},
            "down": {"kernel": (4 * width, width)},
        }
        for number in range(layers)
    }
    return {"tokens": (vocabulary, width), "norm": {"scale": (width,)}, **blocks}


def stacked(shapes: Tree) -> Tree:
    """The same model with its identical blocks stacked along a leading axis."""
    blocks = [name for name in shapes if name.startswith("block")]
    rest = {name: leaves for name, leaves in shapes.items() if name not in blocks}
    layers = jax.tree.map(lambda shape: (len(blocks), *shape), shapes[blocks[0]], is_leaf=is_shape)
    return {**rest, "layers": layers}


def transformer_blocks(layers: int, width: int) -> Tree:
    """Shapes of a GPT-2 without embeddings: 12 leaves for each layer."""
    shapes = gpt(layers, width, 1)
    return {name: leaves for name, leaves in shapes.items() if name.startswith("block")}


def resnet50() -> Tree:
    """Shapes of a ResNet-50: 161 leaves."""

    def unit(size: int, inputs: int, outputs: int) -> Tree:
        return {"conv": (size, size, inputs, outputs), "scale": (outputs,), "bias": (outputs,)}

    shapes = {"stem": unit(7, 3, 64)}
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            name = f"stage{stage}_block{block}"
            shapes[name] = {
                "first": unit(1, inputs, width),
                "second": unit(3, width, width),
                "third": unit(1, width, 4 * width),
            }
            if block == 0:
                shapes[name]["shortcut"] = unit(1, inputs, 4 * width)
            inputs = 4 * width
    return {**shapes, "head": {"kernel": (inputs, 1000), "bias": (1000,)}}


def small_matrices(pairs: int, size: int = 32) -> Tree:
    """Shapes of many small leaves."""
    return {f"layer{n:04d}": {"kernel": (size, size), "bias": (size,)} for n in range(pairs)}


def policy(inputs: int, width: int, outputs: int) -> Tree:
    """Shapes of an agent's MLP with two hidden layers."""
    sizes = (inputs, width, width, outputs)
    return {
        f"layer{n}": {"kernel": sizes[n : n + 2], "bias": sizes[n + 1 : n + 2]} for n in range(3)
    }


def is_shape(node: Any) -> bool:
    """Whether a node of a model is a leaf."""
    return isinstance(node, tuple)


GPT24, GPT124, GPT185, RESNET = "GPT 24M", "GPT-2 124M", "GPT 185M", "ResNet-50"
GPT185_STACKED = "GPT 185M, stacked"
LAYERS32, STACK128, STACK4 = "32 layers", "128 layers, stacked", "4 layers, stacked"
LEAVES300, LEAVES2000, TOY, MLP = "300 leaves", "2000 leaves", "toy", "MLP"
MODELS: dict[str, Callable[[], Tree]] = {
    TOY: lambda: {"kernel": (3, 3), "bias": (1,)},
    MLP: lambda: policy(32, 64, 8),
    GPT24: lambda: gpt(10, 384, 16_000),
    RESNET: resnet50,
    LEAVES300: lambda: transformer_blocks(25, 192),
    GPT124: lambda: gpt(12, 768, 50_257),
    GPT185: lambda: plain_gpt(12, 1024, 32_768),
    GPT185_STACKED: lambda: stacked(plain_gpt(12, 1024, 32_768)),
    LEAVES2000: lambda: small_matrices(1000),
    LAYERS32: lambda: transformer_blocks(32, 64),
    STACK128: lambda: stacked(transformer_blocks(128, 64)),
    STACK4: lambda: stacked(transformer_blocks(4, 64)),
}
