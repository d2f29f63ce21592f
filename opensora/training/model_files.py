"""The files of a checkpoint's model: plain safetensors, each written by one rank."""

from __future__ import annotations

from collections.abc import Iterator

from opensora.models.weight_files import INDEX_NAME, format_index, plan_shards
from opensora.models.weight_stream import TensorSpec, safetensors_layout
from opensora.parallel.engine import Engine
from opensora.parallel.snapshot import Piece

FOLDER = "model"


class ModelFiles:
    """This rank's share of the model's shards, and on rank 0 their index.

    Attributes:
        sizes: in bytes, by name in the checkpoint.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        rank, world_size = engine.context.rank, engine.context.world_size
        specs = {name: TensorSpec(tuple(p.shape), p.dtype) for name, p in engine.module.named_parameters()}
        for shard in engine.shards():  # where tensor parallelism splits it, the module has a part
            specs[shard.name] = TensorSpec(tuple(shard.shape), specs[shard.name].dtype)
        shards = plan_shards(specs)
        self._names = list(specs)
        self._headers: dict[str, bytes] = {}
        self._places: dict[str, tuple[str, int]] = {}  # tensor -> file, byte
        self.sizes: dict[str, int] = {}
        for file, names in shards[rank::world_size]:
            self._add_shard(f"{FOLDER}/{file}", {name: specs[name] for name in names})
        self._index = format_index(specs, shards).encode() if engine.context.is_main else b""
        if self._index:
            self.sizes[f"{FOLDER}/{INDEX_NAME}"] = len(self._index)

    def _add_shard(self, file: str, specs: dict[str, TensorSpec]) -> None:
        self._headers[file], offsets = safetensors_layout(specs, {"format": "pt"})
        self._places |= {name: (file, offset) for name, offset in offsets.items()}
        self.sizes[file] = len(self._headers[file]) + sum(spec.nbytes for spec in specs.values())

    def pieces(self) -> Iterator[Piece]:
        """Every rank goes through them: a parameter that is split is put together by all who have a part."""
        for file, header in self._headers.items():
            yield Piece(file, 0, header)
        if self._index:
            yield Piece(f"{FOLDER}/{INDEX_NAME}", 0, self._index)
        for name in self._names:
            parameter = self._engine.full_parameter(name)
            if name in self._places:
                yield Piece(*self._places[name], parameter)
