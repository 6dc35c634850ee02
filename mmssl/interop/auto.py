"""Our model type for `transformers`: importing this module registers it.

    import mmssl.interop.auto
    processor, model = AutoProcessor.from_pretrained(OUT), AutoModel.from_pretrained(OUT)
    model(**processor(audio=["dog.wav"], text=["a dog barks"]))

OUT is a folder of `mmssl export RUN OUT format=mmssl`, or of `save_pretrained`. No code is loaded
from it.

Letters in shapes: N items, P windows, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.generic import ModelOutput

from mmssl.data.collate import Item, collate
from mmssl.data.text import Tokenizer
from mmssl.embed import sources
from mmssl.embed.spaces import Spaces
from mmssl.embed.windows import Cutter
from mmssl.interop import folder, whole
from mmssl.train.checkpoint import TOKENIZER
from mmssl.types import MODALITIES, Batch, UserError, ViewBatch


class MmsslConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """run: YAML of the resolved run without its data. vocabulary: ids of the tokenizer, if there is one."""

    model_type = whole.MODEL_TYPE

    def __init__(
        self,
        run: str = "",
        vocabulary: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.run, self.vocabulary = run, vocabulary
        super().__init__(**kwargs)


@dataclass
class MmsslOutput(ModelOutput):
    """(N, D) vectors of the modalities that were given, in one space."""

    audio_embeds: Tensor | None = None
    video_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class MmsslModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A whole model, whose vectors are those of `mmssl.load(OUT).encode`."""

    config_class = MmsslConfig
    base_model_prefix = "mmssl"
    main_input_name = "audio_values"

    def __init__(self, config: MmsslConfig) -> None:
        super().__init__(config)
        # not on the meta device that from_pretrained prefers: what is computed when a model is
        # built (filters of spectrograms) is in no file
        with torch.device("cpu"):
            self.model = whole.model_of(config.run, config.vocabulary, "config.json")
        self._spaces = Spaces(self.model)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: the model made them."""

    def forward(
        self,
        space: str | None = None,
        normalize: bool = True,
        return_dict: bool | None = None,
        **features: Tensor,
    ) -> MmsslOutput:
        """Vectors of what the processor makes: windows are averaged.

        Args:
            space: default the trained one with the most modalities.
            normalize: vectors of unit length.
            return_dict: always on.
            features: `M_values`, `M_lengths` and `M_items` of modalities M.

        Raises:
            UserError: no such space, or a modality that it does not hold.
        """
        name = self._spaces.named(space)
        keys = self._spaces.keys([name])
        found: dict[str, Tensor] = {}
        for modality in (m for m in MODALITIES if f"{m}_values" in features):
            if (modality, name) not in keys:
                raise UserError(f"{modality}: is not in {name}; spaces are {self._spaces.told}")
            view = keys[modality, name]
            values, lengths, items = (features[f"{modality}_{f}"] for f in _FEATURES)
            batch = _batch(view, self._spaces.views[view], values, lengths)
            z_PD = self._spaces.vectors(keys, normalize, view, batch)[name]
            sums_ND = z_PD.new_zeros(int(items.max()) + 1, z_PD.shape[1]).index_add(0, items, z_PD)
            mean_ND = sums_ND / items.bincount(minlength=len(sums_ND)).clamp(min=1)[:, None]
            found[f"{modality}_embeds"] = F.normalize(mean_ND, dim=-1) if normalize else mean_ND
        return MmsslOutput(**found)


_FEATURES = ("values", "lengths", "items")


def _batch(name: str, spec: Any, values: Tensor, lengths_P: Tensor) -> Batch:
    """The rows of one view."""
    index = torch.arange(len(values), device=values.device)
    view = ViewBatch(
        modality=spec.modality,
        data=values,
        lengths_P=lengths_P,
        rows_P=index,
        slots_P=torch.zeros_like(index),
        seeds_P=torch.zeros_like(index),
        start_s_P=torch.zeros(len(index), device=values.device),
        present_BL=torch.ones(len(index), 1, dtype=torch.bool, device=values.device),
        rate={"audio": float(spec.hz), "video": spec.fps, "text": 0.0}[spec.modality],
    )
    return Batch({name: view}, [str(i) for i in range(len(values))], index, index, index)


class MmsslProcessor(ProcessorMixin):
    """Files, arrays and texts to the model's tensors, by the code that evaluation uses."""

    def __init__(self, spaces: Spaces, tokenizer: Tokenizer | None, said: dict[str, Any]) -> None:
        self._spaces, self._words, self._said = spaces, tokenizer, said

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> MmsslProcessor:
        """Read a local folder."""
        path = Path(pretrained_model_name_or_path)
        said = folder.read_json(path / folder.CONFIG)
        with torch.device("meta"):  # of the model only what its spaces are
            model = whole.model_of(said["run"], said["vocabulary"], str(path))
        tokenizer = whole.tokenizer_of(path)
        return cls(Spaces(model, text=tokenizer is not None), tokenizer, said)

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write the tokenizer; the rest is in the model's config.json."""
        out = Path(save_directory)
        out.mkdir(parents=True, exist_ok=True)
        (out / "processor_config.json").write_text(json.dumps({"processor_class": whole.PROCESSOR}))
        if self._words is not None:
            (out / TOKENIZER).write_bytes(self._words.model)
        if not (out / folder.CONFIG).exists():
            (out / folder.CONFIG).write_text(json.dumps(self._said))

    def __call__(
        self,
        audio: list[Any] | None = None,
        video: list[Any] | None = None,
        text: list[str] | None = None,
        space: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Windows of lists of sounds, videos and texts, each list by itself.

        Values are what `mmssl.load(OUT).encode` takes; windows are those of training.

        Raises:
            UserError: a value that cannot be read, or a modality that the space does not hold.
        """
        keys = self._spaces.keys([self._spaces.named(space)])
        found: dict[str, Tensor] = {}
        for modality, values in (("audio", audio), ("video", video), ("text", text)):
            view = next((v for (m, _), v in keys.items() if m == modality), None)
            if values is None:
                continue
            if view is None:
                raise UserError(f"{modality}: is not read; spaces are {self._spaces.told}")
            spec = self._spaces.views[view]
            rows = sources.rows({modality: list(values)})
            cutter = Cutter({view: spec}, self._words)
            pieces = [p for i, row in enumerate(rows) for p in cutter.pieces(i, row)]
            longest = {"crop_s": max(p.padded_s for p in pieces)} if modality != "text" else {}
            items = [Item(str(p.item), "", 0, [], {view: [p.data]}) for p in pieces]
            made = collate(items, {view: spec.model_copy(update=longest)}).views[view]
            numbers = torch.tensor([p.item for p in pieces])
            columns = (made.data, made.lengths_P, numbers)
            found |= {f"{modality}_{f}": x for f, x in zip(_FEATURES, columns, strict=True)}
        return BatchFeature(found)


AutoConfig.register(whole.MODEL_TYPE, MmsslConfig)
AutoModel.register(MmsslConfig, MmsslModel)
AutoProcessor.register(MmsslConfig, MmsslProcessor)  # type: ignore[no-untyped-call]
