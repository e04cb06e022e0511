"""Merge a base folder and an adapter folder into a model folder, a strip of rows at a time.

No model is built and no tensor is ever whole in memory, so that what it takes is the same at any size: the adapter, and
some strips. Sums are taken in fp32 and rounded once, to what is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from whet.errors import WhetError
from whet.export.compressed import SCHEMES, compressed
from whet.export.merge_adapter import IN_MEMORY, Adapter, Change, LowRank, read_adapter
from whet.export.merge_base import Base
from whet.export.merge_files import TensorFiles, strips
from whet.export.merge_formats import FLOATS, Format, Nf4, Plain, Track, alike, write_weights
from whet.export.merge_layout import Layout, layout_of
from whet.files import staged_folder
from whet.models.load import load_config, resolve

FORMATS = (*FLOATS, "nf4", *SCHEMES)
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
OTHER_BASE = "name the base that the adapter was trained on"


@dataclass(frozen=True)
class Merged:
    """What was written.

    bytes: of all tensors. changed: how many weights the adapter changed. untied: the head, which in the base shares the
    embedding's values, has its own now. kept: linear layers that were not quantized, and why.
    """

    folder: Path
    bytes: int
    changed: int
    untied: bool
    kept: dict[str, str]


def merge_folders(
    base: str | Path,
    out: Path,
    *,
    adapter: Path | None = None,
    to: str = "bf16",
    held: str | None = None,
    computed: torch.dtype = torch.bfloat16,
    max_shard_size: int | str = "5GB",
    importance: Mapping[str, Tensor] | None = None,
    device: str | torch.device | None = None,
    track: Track | None = None,
) -> Merged:
    """Write the model of `base` with `adapter` merged in to `out`, with its tokenizer: all of it, or nothing.

    base: a model folder or a built-in name, in 16 or 32 bits or in bitsandbytes' 4 or 8. to: one of FORMATS.
    held: what the base was held in while the adapter was trained, "nf4" or "int8": the adapter is then added to those
    values, dequantized to `computed`; None adds it to what the folder holds.
    importance: for "w4a16", a layer's name -> mean squares of its inputs.
    device: to compute on; a GPU where there is one. bitsandbytes' kernels round alike only on one kind of device.
    Raises WhetError where base, adapter and arguments do not fit together, before anything is written.
    """
    if to not in FORMATS:
        raise WhetError(f"unknown format {to!r}", where="to", fix=f"use one of {', '.join(FORMATS)}")
    folder, where = _folder(base), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_config(str(folder))
    read = Base(TensorFiles(folder), config, layout_of(without_quantization(config)), held, computed, where)
    source = MergedWeights(read, read_adapter(adapter) if adapter else None)
    config = _merged_config(config, source)
    layout = layout_of(config)
    _check_whole(source, layout, folder)
    form, kept = form_of(to, layout, importance=importance)
    with staged_folder(out) as staged:
        size = write_weights(source, form, staged, max_shard_size, track)
        write_config(config, form, staged)
        if (folder / "generation_config.json").is_file():
            shutil.copyfile(folder / "generation_config.json", staged / "generation_config.json")
        copy_tokenizer([adapter, folder], staged)
        written = {path.name for path in staged.iterdir()}
    remove_older_weights(out, written)
    return Merged(out, size, source.changed, source.untied, kept)


def form_of(
    to: str, layout: Layout, dtype: torch.dtype | None = None, importance: Mapping[str, Tensor] | None = None
) -> tuple[Format, dict[str, str]]:
    """The format named `to` for a model, and the linear layers that it does not quantize, and why.

    dtype: of what is not quantized; bf16, unless `to` is itself the name of one. importance: see `compressed`.
    """
    if to in FLOATS:
        return Plain(FLOATS[to]), {}
    dtype = dtype or torch.bfloat16
    kept = dict.fromkeys(layout.kept, "the output head is not quantized")
    if to == "nf4":
        return Nf4(dtype, frozenset(layout.linear), layout.kept), kept
    form = compressed(to, layout, dtype, importance)
    return form, kept | form.unfit


class MergedWeights:
    """The weights of a base with an adapter added, in strips. A `Source`.

    changed: how many the adapter changes. layout: of the base. untied: the head has values of its own, though the base
    shares those of the embedding.
    """

    def __init__(self, base: Base, adapter: Adapter | None):
        self._base, self._adapter, self.layout = base, adapter, base.layout
        self._changes = {name: change.to(base.device) for name, change in adapter.changes.items()} if adapter else {}
        self._lies_in: dict[str, str] = {}  # a weight -> the base's that it starts from, where that has another name
        self._norms: tuple[str, Tensor] | None = None
        names = list(base.names)
        self.changed = len(self._changes)
        self.untied = False
        for head, embedding in self.layout.tied.items():
            names = self._untie(names, head, embedding)
        self.names: Collection[str] = names
        for name in self._changes:
            self._check(name)

    def _untie(self, names: list[str], head: str, embedding: str) -> list[str]:
        """Keep the head where its values end up other than the embedding's, whose place in memory it shares."""
        if embedding not in names:
            return names
        if head not in names:
            if head not in self._changes and embedding not in self._changes:
                return names
            self._lies_in[head] = embedding
            tokens = self._changes[embedding].tokens if embedding in self._changes else None
            if head not in self._changes and tokens is not None:
                self._changes[head] = Change(tokens=tokens)  # PEFT trains such rows of both at once, and saves one
        for name in {head, embedding} & self._changes.keys():
            self._check(name)
        others = [name for name in names if name != head]
        if alike(self, head, embedding):
            return others
        self.untied = True
        return [*others, head]

    def shape(self, name: str) -> tuple[int, ...]:
        change = self._changes.get(name)
        if change is not None and change.replaced is not None and self._adapter is not None:
            return self._adapter.files.part(change.replaced).shape
        return self._base.shape(self._lies_in.get(name, name))

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(self._lies_in.get(name, name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        change = self._changes.get(name)
        weight = self._before(name, start, stop)
        if change is None:
            return weight
        if change.low_rank is not None:
            weight = weight + change.low_rank.rows(start, stop)
            magnitude = change.low_rank.magnitude
            if magnitude is not None and change.low_rank.transposed:
                weight = weight * (magnitude / self._column_norms(name, change.low_rank))
            elif magnitude is not None:
                weight = weight * (magnitude[start:stop] / weight.norm(dim=1))[:, None]
        if change.tokens is not None:
            ids, values = change.tokens
            here = (ids >= start) & (ids < stop)
            weight = weight.index_copy(0, ids[here] - start, values[here])
        if change.shift is not None:
            weight = weight + change.shift[start:stop]
        return weight

    def _before(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the base, or of what was trained in its place."""
        change = self._changes.get(name)
        if change is not None and change.replaced is not None and self._adapter is not None:
            return self._adapter.files.rows(change.replaced, start, stop).to(self._base.device).float()
        return self._base.rows(self._lies_in.get(name, name), start, stop)

    def _column_norms(self, name: str, low_rank: LowRank) -> Tensor:
        """|W + s B A| down each column, for DoRA on an embedding: over all strips, once."""
        if self._norms is None or self._norms[0] != name:
            total = torch.zeros(self.shape(name)[1], device=self._base.device, dtype=torch.float64)
            for start, stop in strips(self.shape(name)):
                total += (self._before(name, start, stop) + low_rank.rows(start, stop)).double().square().sum(dim=0)
            self._norms = (name, total.sqrt().float())
        return self._norms[1]

    def _check(self, name: str) -> None:
        """Raise WhetError for a change to a weight that the base lacks, or of another shape than it has."""
        assert self._adapter is not None
        change, where = self._changes[name], str(self._adapter.folder)
        if name not in self._base.names and name not in self._lies_in:
            # Architectures whose files hold other names than the model does are merged in memory.
            fix = f"{OTHER_BASE}, or {IN_MEMORY}"
            raise WhetError(f"the adapter changes {name}, which the base lacks", where=where, fix=fix)
        shape, before = self.shape(name), self._base.shape(self._lies_in.get(name, name))
        resizable = 1 if name in (self.layout.embedding, self.layout.head) else 0
        if shape[resizable:] != before[resizable:]:
            what = f"{name} is {shape} in the adapter and {before} in the base"
            raise WhetError(what, where=where, fix=OTHER_BASE)
        if change.low_rank is not None and change.low_rank.shape != shape:
            what = f"the adapter of {name} is for {change.low_rank.shape}, the weight is {shape}"
            raise WhetError(what, where=where, fix=OTHER_BASE)
        if change.tokens is not None and int(change.tokens[0].max()) >= shape[0]:
            what = f"the adapter trained row {int(change.tokens[0].max())} of {name}, which has {shape[0]}"
            raise WhetError(what, where=where, fix=OTHER_BASE)


def _folder(base: str | Path) -> Path:
    folder = Path(resolve(str(base)))
    if not folder.is_dir():
        what = "a base that is merged by folder must be on this machine"
        raise WhetError(what, where=str(base), fix="download it first and give the folder")
    return folder


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the same model, not quantized."""
    return type(config).from_dict({k: v for k, v in config.to_dict().items() if k != "quantization_config"})


def _merged_config(config: PretrainedConfig, source: MergedWeights) -> PretrainedConfig:
    merged = without_quantization(config)
    embedding = source.layout.embedding
    if embedding is not None and embedding in source.names:
        merged.get_text_config().vocab_size = source.shape(embedding)[0]
    if source.untied:
        untie(merged)
    return merged


def untie(config: PretrainedConfig) -> None:
    """Say that the head has values of its own."""
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def _check_whole(source: MergedWeights, layout: Layout, folder: Path) -> None:
    """Raise WhetError where the folder would not hold what a model of its config loads."""
    names = set(source.names)
    for name in sorted(names & layout.shapes.keys()):
        if source.shape(name) != layout.shapes[name]:
            what = f"{name} is {source.shape(name)} but {layout.shapes[name]} by config.json"
            fix = "copy config.json and the weights again from one source, and train what was added to both ends"
            raise WhetError(what, where=str(folder), fix=fix)
    missing = sorted(layout.shapes.keys() - names - layout.tied.keys())
    # Some architectures hold weights under other names than the model's own; transformers knows which.
    if missing and names <= layout.shapes.keys():
        what = f"the files lack {len(missing)} of the model's weights, {missing[0]} first"
        raise WhetError(what, where=str(folder), fix="copy all *.safetensors again from the model's source")


def write_config(config: PretrainedConfig, form: Format, folder: Path) -> None:
    config.dtype = str(form.dtype).removeprefix("torch.")
    config.use_cache = True
    if (quantization := form.quantization()) is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)


def copy_tokenizer(folders: Iterable[Path | None], to: Path) -> None:
    """Copy the tokenizer's files, as they are, from the first folder that has one."""
    for folder in folders:
        if folder is not None and (folder / "tokenizer_config.json").is_file():
            for name in TOKENIZER_FILES:
                if (folder / name).is_dir():
                    shutil.copytree(folder / name, to / name)
                elif (folder / name).is_file():
                    shutil.copyfile(folder / name, to / name)
            return


def remove_older_weights(folder: Path, written: set[str]) -> None:
    """An older export's single file would be read before new shards, and its shards would only take up space."""
    for weights in folder.glob("model*.safetensors*"):
        if weights.name not in written:
            weights.unlink()
