"""Run an ONNX export: a model without PyTorch weights whose `generate` is transformers' own."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import ModelOutput

from ..system.reading import read_json
from .checks import checked

MANIFEST = "export.json"  # transformers' own, beside every graph that its exporters save


class OnnxModel(PreTrainedModel, GenerationMixin):
    """Logits and cache of the graph that `export` wrote to `folder`, computed by ONNX Runtime on the CPU.

    `options` are an onnxruntime.SessionOptions, for the number of threads and the like.
    """

    device = torch.device("cpu")

    def __init__(self, folder: str | Path, options: Any = None):
        from transformers.exporters import ExportedModel

        exported = ExportedModel.from_pretrained(folder, device="cpu", session_options=options)
        super().__init__(exported.config)
        self.generation_config = exported.generation_config
        (self.runner,) = exported.runners.values()
        keys = [spec.shape for spec in self.runner.session.get_inputs() if spec.name.endswith(".keys")]
        self.heads = [(int(heads), int(size)) for _, heads, _, size in keys]  # of each layer's cache

    dtype = property(lambda self: self.runner.dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: DynamicCache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> ModelOutput:
        """input_ids: (batch, tokens); attention_mask: (batch, cached + tokens); the output has logits and the cache."""
        cache = DynamicCache(config=self.config) if cache is None else cache
        for layer, (heads, size) in zip(cache.layers, self.heads, strict=True):
            if not layer.is_initialized:
                empty = torch.empty(len(input_ids), heads, 0, size, dtype=self.dtype)
                layer.update(empty, empty)
        past = cache.layers[0].keys.shape[-2]  # the graph does not count for layers with a sliding window
        if attention_mask is None:
            attention_mask = torch.ones(len(input_ids), past + input_ids.shape[1], dtype=torch.int64)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp_min(0)[:, past:]
        return self.runner(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache)


def load_export(folder: Path, dtype: str | None = None) -> tuple[OnnxModel, PreTrainedTokenizerBase]:
    """`(model, tokenizer)` of what `export` wrote for ONNX; hashes are checked first."""
    with checked(folder, graphs=True):
        if read_json(folder / MANIFEST).get("export_format") != "onnx":
            raise ValueError(f"{folder} is an OpenVINO export: openvino_genai.LLMPipeline runs it")
        if dtype not in (None, "float32"):
            raise ValueError(f"{folder} is an ONNX export: it computes in float32, not in {dtype}")
        return OnnxModel(folder).eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
