"""A decoder as an ONNX graph: a pure function of tokens and of the KV that is in the pool.

One graph serves decoding (one token of many sequences), prefill (many of one) and verification.

| input | is |
| --- | --- |
| ``tokens`` INT64 [B, T] | new tokens of B sequences, each with as many |
| ``past`` INT64 [B] | how many tokens of a sequence are in the pool; the new ones follow them |
| ``table`` INT64 [B, M] | its blocks; what is behind ``past`` is not read |
| ``rows`` INT64 [R] | for which of the B * T new tokens logits are wanted |
| ``pool`` FP32 [N, layers, 2, kv_heads, size, head_dim] | keys and values by blocks |
| ``places`` INT64 [I, 1] | of a model that sees images: which of the B * T tokens are images |
| ``images`` FP32 [I, hidden] | what stands there |

| output | is |
| --- | --- |
| ``logits`` FP32 [R, vocab] | what comes behind them |
| ``hidden`` FP32 [B * T, hidden] | the last layer's output, normalized |
| ``new`` FP32 [layers * 2, B, kv_heads, T, head_dim] | keys and values of the new tokens |

Weights are not in it: they are its initializers, to be given to the session beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from cotenant.engines.llm.checkpoint import Checkpoint
from cotenant.engines.llm.decoder import Decoder, Rope
from cotenant.engines.llm.families.base import Floats
from cotenant.engines.llm.weights import (
    GROUP,
    Build,
    Matrix,
    Packed,
    Quantized,
    height,
    matrix,
    nibbles,
    stack,
)
from cotenant.engines.onnx import session_options

MICROSOFT: Final = "com.microsoft"
EXACT: Final = 1
ROUNDED: Final = 4
"""``accuracy_level`` of MatMulNBits: activations in FP32, or rounded to 8 bits."""
NEVER: Final = -1e30
"""Added to the score of what must not be looked at."""

Weights = dict[str, npt.NDArray[Any]]


class Graph:
    """Nodes, constants and weights in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.weights: Weights = {}
        self._names = count(1)

    def node(self, kind: str, *inputs: str, to: str = "", domain: str = "", **how: Any) -> str:
        """Append one; the name of its output."""
        return self.nodes_of(kind, inputs, (to or self._name(kind),), domain, **how)[0]

    def nodes_of(
        self, kind: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **how: Any
    ) -> Sequence[str]:
        """Append one with these outputs; "" is one that is not wanted."""
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **how))
        return outputs

    def split(self, value: str, sizes: str, axis: int, parts: int) -> Sequence[str]:
        """Its parts, of ``sizes``."""
        names = [self._name("part") for _ in range(parts)]
        return self.nodes_of("Split", (value, sizes), names, axis=axis)

    def constant(self, value: Any, dtype: npt.DTypeLike = np.int64) -> str:
        """A small one, in the graph itself."""
        name = self._name("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weight(self, value: npt.NDArray[Any]) -> str:
        """A large one, beside the graph."""
        name = self._name("weight")
        self.weights[name] = np.ascontiguousarray(value)
        return name

    def reshape(self, value: str, *shape: int) -> str:
        """0 keeps an axis, -1 is what is left."""
        return self.node("Reshape", value, self.constant(shape))

    def _name(self, kind: str) -> str:
        return f"{kind}.{next(self._names)}"


def build_graph(
    checkpoint: Checkpoint, build: Build, size: int, context: int
) -> tuple[onnx.ModelProto, Weights]:
    """The graph of a model for blocks of ``size`` tokens and sequences of up to ``context``, and
    its weights by name, which it has as external data."""
    made = _Layers(checkpoint, build, size, context)
    made.run()
    decoder, graph = checkpoint.decoder, made.graph
    block = decoder.block(size)
    value = helper.make_tensor_value_info
    inputs = [
        value("tokens", TensorProto.INT64, ("B", "T")),
        value("past", TensorProto.INT64, ("B",)),
        value("table", TensorProto.INT64, ("B", "M")),
        value("rows", TensorProto.INT64, ("R",)),
        value("pool", TensorProto.FLOAT, ("N", *block)),
    ]
    if checkpoint.vision is not None:
        inputs.append(value("places", TensorProto.INT64, ("I", 1)))
        inputs.append(value("images", TensorProto.FLOAT, ("I", decoder.hidden)))
    outputs = [
        value("logits", TensorProto.FLOAT, ("R", decoder.vocab)),
        value("hidden", TensorProto.FLOAT, ("BT", decoder.hidden)),
        value("new", TensorProto.FLOAT, (block[0] * 2, "B", block[2], "T", block[4])),
    ]
    return finished(graph, "decoder", inputs, outputs), graph.weights


def finished(
    graph: Graph,
    name: str,
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """A graph as a model, its weights as external data."""
    beside = [_external(each, weight) for each, weight in graph.weights.items()]
    tensors = [*graph.constants, *beside]
    proto = helper.make_graph(graph.nodes, name, inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=10)


def session_of(graph: onnx.ModelProto, weights: Weights, threads: int) -> ort.InferenceSession:
    """A session of a model and its weights on so many threads. Raises what ONNX Runtime does."""
    options = session_options(threads)
    values = [ort.OrtValue.ortvalue_from_numpy(weight) for weight in weights.values()]
    options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _external(name: str, weight: npt.NDArray[Any]) -> onnx.TensorProto:
    """Stands for a weight that the session is given by name."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    found = TensorProto(name=name, data_type=kind, dims=weight.shape)
    found.data_location = TensorProto.EXTERNAL
    found.external_data.add(key="location", value="beside")
    return found


class _Layers:
    """Builds the graph from the bottom up."""

    def __init__(self, checkpoint: Checkpoint, build: Build, size: int, context: int) -> None:
        self.graph = Graph()
        self._checkpoint = checkpoint
        self._decoder: Decoder = checkpoint.decoder
        self._build = build
        self._size = size
        self._context = context
        self._embedding = matrix(checkpoint, "embedding", build)
        self._caches: dict[Rope, tuple[str, str]] = {}
        self._masks: dict[int, str] = {}
        self._table = ""
        self._summed: dict[str, str] = {}

    def run(self) -> None:
        """Append everything."""
        decoder, graph = self._decoder, self.graph
        self._prepare()
        stream = self._embed()
        normed, new = self._norm(stream, "0.attention_norm"), []
        for layer in range(decoder.layers):
            attended, keys, values = self._attention(normed, layer)
            new += [keys, values]
            if decoder.after_norm:
                attended = self._norm(attended, f"{layer}.attention_after")
            normed, stream = self._add(attended, stream, f"{layer}.ffn_norm")
            fed = self._feed(normed, layer)
            if decoder.after_norm:
                fed = self._norm(fed, f"{layer}.ffn_after")
            last = layer + 1 == decoder.layers
            following = "norm" if last else f"{layer + 1}.attention_norm"
            normed, stream = self._add(fed, stream, following)
        graph.node("Identity", normed, to="hidden")
        graph.node("Concat", *new, to="new", axis=0)
        logits = self._head(graph.node("Gather", normed, "rows"))
        if decoder.logit_cap:
            logits = self._cap(logits, decoder.logit_cap)
        graph.node("Identity", logits, to="logits")

    # --- what all layers share --------------------------------------------------------------

    def _prepare(self) -> None:
        """Positions, shapes, and where in the pool each sequence is."""
        graph, decoder, constant = self.graph, self._decoder, self.graph.constant
        shape = graph.node("Shape", "tokens")
        self._flat = graph.reshape("tokens", -1)
        self._heads_shape = {
            heads: graph.node("Concat", shape, constant([heads, decoder.head_dim]), axis=0)
            for heads in {decoder.heads, decoder.kv_heads}
        }
        count = graph.node("Gather", shape, constant(1))
        blocks = graph.node("Gather", graph.node("Shape", "table"), constant(1))
        slots = graph.node("Mul", blocks, constant(self._size))
        lengths = [graph.node("Unsqueeze", each, constant([0])) for each in (slots, count)]
        self._lengths = graph.node("Concat", *lengths, axis=0)
        self._slots = graph.node("Range", constant(0), slots, constant(1))
        self._steps = graph.node("Range", constant(0), count, constant(1))
        self._past = graph.reshape("past", -1, 1)
        self._positions = graph.node("Add", self._past, self._steps)
        self._pool = graph.reshape("pool", -1, self._size, decoder.head_dim)
        stride = constant(decoder.layers * 2 * decoder.kv_heads)
        tables = graph.node("Mul", graph.node("Unsqueeze", "table", constant([1])), stride)
        heads = constant(np.arange(decoder.kv_heads).reshape(1, -1, 1))
        self._places = graph.node("Add", tables, heads)

    def _mask(self, window: int) -> str:
        """[B, 1, heads / kv_heads * T, M * size + T]: 0 for what a new token looks at."""
        if window in self._masks:
            return self._masks[window]
        graph, constant = self.graph, self.graph.constant
        here = graph.node("Unsqueeze", self._positions, constant([2]))
        exists = graph.node("GreaterOrEqual", here, constant(0))  # brings both to [B, T, ...]
        past = graph.node("Unsqueeze", self._past, constant([2]))
        old = graph.node("And", exists, graph.node("Less", self._slots, past))
        step = graph.reshape(self._steps, -1, 1)
        new = graph.node("And", exists, graph.node("LessOrEqual", self._steps, step))
        if window:
            limit = constant(window)
            behind = graph.node("Sub", here, self._slots)
            old = graph.node("And", old, graph.node("Less", behind, limit))
            behind = graph.node("Sub", step, self._steps)
            new = graph.node("And", new, graph.node("Less", behind, limit))
        seen = graph.node("Concat", old, new, axis=2)
        added = graph.node("Where", seen, constant(0, np.float32), constant(NEVER, np.float32))
        groups = self._decoder.heads // self._decoder.kv_heads
        rows = graph.node("Concat", *[added] * groups, axis=1)
        self._masks[window] = graph.node("Unsqueeze", rows, constant([1]))
        return self._masks[window]

    def _rotate(self, heads: str, rope: Rope) -> str:
        if rope not in self._caches:
            positions = np.arange(self._context, dtype=np.float64)
            angles = np.outer(positions, rope.frequencies(self._decoder.head_dim))
            cos, sin = (each(angles).astype(np.float32) for each in (np.cos, np.sin))
            self._caches[rope] = self.graph.weight(cos), self.graph.weight(sin)
        caches = self._caches[rope]
        return self.graph.node("RotaryEmbedding", heads, self._positions, *caches, domain=MICROSOFT)

    def _cap(self, value: str, cap: float) -> str:
        limit = self.graph.constant(cap, np.float32)
        bent = self.graph.node("Tanh", self.graph.node("Div", value, limit))
        return self.graph.node("Mul", bent, limit)

    # --- attention --------------------------------------------------------------------------

    def _attention(self, normed: str, layer: int) -> tuple[str, str, str]:
        """What attention gives, and the new keys and values."""
        graph, decoder = self.graph, self._decoder
        queries, keys, values = self._project(normed, layer)
        rope = decoder.rope_of(layer)
        queries = self._rotate(self._heads(queries, decoder.heads, layer, "q_norm"), rope)
        keys = self._rotate(self._heads(keys, decoder.kv_heads, layer, "k_norm"), rope)
        values = self._heads(values, decoder.kv_heads, layer)
        # Heads that share keys are rows of one matrix: [B, kv_heads, heads / kv_heads * T, D].
        queries = graph.reshape(queries, 0, decoder.kv_heads, -1, decoder.head_dim)
        old_keys, old_values = self._cached(2 * layer), self._cached(2 * layer + 1)
        both = [self._scores(queries, each) for each in (old_keys, keys)]
        scores = graph.node("Concat", *both, axis=3)
        if decoder.attention_cap:
            scores = self._cap(scores, decoder.attention_cap)
        scores = graph.node("Add", scores, self._mask(decoder.window(layer)))
        weights = graph.node("Softmax", scores, axis=-1)
        old, new = graph.split(weights, self._lengths, 3, parts=2)
        from_old, from_new = (
            graph.node("MatMul", part, each) for part, each in ((old, old_values), (new, values))
        )
        summed = graph.node("Add", from_old, from_new)
        summed = graph.reshape(summed, 0, decoder.heads, -1, decoder.head_dim)
        summed = graph.node("Transpose", summed, perm=[0, 2, 1, 3])
        flat = graph.reshape(summed, -1, decoder.heads * decoder.head_dim)
        attended = self._multiply(flat, self._matrix(f"{layer}.o"))
        if decoder.o_bias:
            attended = graph.node("Add", attended, self._vector(f"{layer}.o_bias"))
        axis = graph.constant([0])
        kept = [graph.node("Unsqueeze", each, axis) for each in (keys, values)]
        return attended, kept[0], kept[1]

    def _project(self, normed: str, layer: int) -> Sequence[str]:
        """Queries, keys and values; in one multiplication where they are stored alike."""
        graph, decoder, names = self.graph, self._decoder, ("q", "k", "v")
        parts = self._multiply_all(normed, [f"{layer}.{name}" for name in names])
        if not decoder.qkv_bias:
            return parts
        return [
            graph.node("Add", part, self._vector(f"{layer}.{name}_bias"))
            for part, name in zip(parts, names, strict=True)
        ]

    def _heads(self, value: str, heads: int, layer: int, norm: str = "") -> str:
        """[B, heads, T, D] of [B * T, heads * D]."""
        graph = self.graph
        value = graph.node("Reshape", value, self._heads_shape[heads])
        if norm and self._decoder.head_norm:
            value = self._norm(value, f"{layer}.{norm}")
        return graph.node("Transpose", value, perm=[0, 2, 1, 3])

    def _cached(self, part: int) -> str:
        """Keys or values of a layer from the pool, [B, kv_heads, M * size, D]."""
        graph, decoder = self.graph, self._decoder
        offset = graph.constant(part * decoder.kv_heads)
        places = graph.node("Add", self._places, offset)
        blocks = graph.node("Gather", self._pool, places)
        return graph.reshape(blocks, 0, decoder.kv_heads, -1, decoder.head_dim)

    def _scores(self, queries: str, keys: str) -> str:
        scale = self._decoder.query_scale
        return self.graph.node(
            "FusedMatMul", queries, keys, domain=MICROSOFT, alpha=scale, transB=1
        )

    # --- the network ------------------------------------------------------------------------

    def _feed(self, normed: str, layer: int) -> str:
        gate, up = self._multiply_all(normed, [f"{layer}.gate", f"{layer}.up"])
        graph = self.graph
        if self._decoder.activation == "silu":
            gate = graph.node("QuickGelu", gate, domain=MICROSOFT, alpha=1.0)
        else:
            gate = graph.node("FastGelu", gate, domain=MICROSOFT)
        return self._multiply(graph.node("Mul", gate, up), self._matrix(f"{layer}.down"))

    def _norm(self, value: str, name: str) -> str:
        return self.graph.node(
            "SimplifiedLayerNormalization",
            value,
            self._vector(name),
            axis=-1,
            epsilon=self._decoder.epsilon,
        )

    def _add(self, value: str, stream: str, norm: str) -> tuple[str, str]:
        """The stream with a value added, normalized; and as it is."""
        graph = self.graph
        stream = graph.node("Add", value, stream)
        return self._norm(stream, norm), stream

    # --- weights ----------------------------------------------------------------------------

    def _vector(self, name: str) -> str:
        return self.graph.weight(self._checkpoint.floats(name))

    def _matrix(self, name: str) -> Matrix:
        return matrix(self._checkpoint, name, self._build)

    def _embed(self) -> str:
        graph, table, scale = self.graph, self._embedding, self._decoder.embedding_scale
        if isinstance(table, Quantized) and table.offsets is None:
            packed = nibbles(table.numbers) if table.bits == 4 else table.numbers
            stream = graph.node(
                "GatherBlockQuantized",
                graph.weight(packed),
                self._flat,
                graph.weight(table.scales),
                domain=MICROSOFT,
                bits=table.bits,
                block_size=GROUP,
                gather_axis=0,
                quantize_axis=1,
            )
        else:
            weight = table.floats() if isinstance(table, Quantized) else table
            stream = graph.node("Gather", self._float(weight), self._flat)
        if scale != 1:
            stream = graph.node("Mul", stream, graph.constant(scale, np.float32))
        if self._checkpoint.vision is None:
            return stream
        return graph.node("ScatterND", stream, "places", "images")

    def _head(self, value: str) -> str:
        by = self._embedding if self._decoder.tied else self._matrix("head")
        return self._multiply(value, by)

    def _multiply_all(self, value: str, names: list[str]) -> Sequence[str]:
        """By several matrices; in one go where they are stored alike."""
        parts = [self._matrix(name) for name in names]
        whole = stack(parts)
        if whole is None:
            return [self._multiply(value, part) for part in parts]
        sizes = self.graph.constant([height(part) for part in parts])
        return self.graph.split(self._multiply(value, whole), sizes, 1, len(parts))

    def _multiply(self, value: str, by: Matrix) -> str:
        if not isinstance(by, Quantized):
            return self.graph.node("Gemm", value, self._float(by), transB=1)
        graph, offsets = self.graph, by.offsets
        if by.bits == 4 or self._build.rounded:
            found = self._by_bits(value, by.bits, by.numbers, by.scales)
        else:  # ONNX Runtime's own kernel for 8 bits takes ten times as long as that for 4
            upper = self._by_bits(value, 4, by.numbers >> np.uint8(4), by.scales * np.float32(16))
            lower = self._by_bits(value, 4, by.numbers & np.uint8(15), by.scales)
            found = graph.node("Add", upper, lower)
            offsets = by.scales * np.float32(8)  # the lower halves are taken less 8
        if offsets is None:
            return found
        sums = self._sums(value, offsets.shape[1])
        return graph.node("Gemm", sums, graph.weight(offsets), found, transB=1)

    def _by_bits(self, value: str, bits: int, numbers: Packed, scales: Floats) -> str:
        graph, (out, groups) = self.graph, scales.shape
        packed = nibbles(numbers) if bits == 4 else numbers
        return graph.node(
            "MatMulNBits",
            value,
            graph.weight(packed.reshape(out, groups, -1)),
            graph.weight(scales),
            domain=MICROSOFT,
            K=groups * GROUP,
            N=out,
            bits=bits,
            block_size=GROUP,
            accuracy_level=ROUNDED if self._build.rounded else EXACT,
        )

    def _sums(self, value: str, groups: int) -> str:
        """Of each group of activations: what an offset is multiplied by."""
        if value not in self._summed:
            grouped = self.graph.reshape(value, 0, groups, GROUP)
            axes = self.graph.constant([2])
            self._summed[value] = self.graph.node("ReduceSum", grouped, axes, keepdims=0)
        return self._summed[value]

    def _float(self, weight: Floats) -> str:
        """The embedding is gathered from and may be the head: it is there once."""
        if weight is not self._embedding:
            return self.graph.weight(weight)
        self._table = self._table or self.graph.weight(weight)
        return self._table
