"""PyTorch as an engine: eager, compiled or in bf16."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo.engines.timing import Arrays
from export.runtime.classifier import Execution
from train.common.errors import EngineError, first_line

EAGER, COMPILED, BF16 = "eager", "compiled", "bf16"

PYTORCH_MODES = {
    EAGER: "fp32, eager: as in PEFT's tutorial",
    COMPILED: "fp32, torch.compile",
    BF16: "bf16, eager",
}
"""How the PyTorch side may run, with words for people."""


@dataclass(frozen=True)
class PromptLogits:
    """Logits of a batch with the learned prompt, with random prompts in its place, and with none but the same head.

    All float32; shape = (n_batch, n_labels), for the random prompts (n_prompts, n_batch, n_labels).
    """

    learned: np.ndarray
    random: np.ndarray
    none: np.ndarray


class PyTorchBackend:
    """The adapter as the PEFT tutorial runs it, `PeftModel.forward`; on request compiled, or in bf16."""

    def __init__(self, adapter_folder: Path, threads: int, *, mode: str = EAGER, base_model: str | None = None) -> None:
        """Load an adapter, in one of `PYTORCH_MODES`; an EngineError where `torch.compile` does not work.

        ``base_model`` is as for `load_adapter`.
        """
        import torch

        from train.adapter.folder import load_adapter
        from train.adapter.peft import find_adapter_base, load_peft_model

        torch.set_num_threads(threads)
        adapter = load_adapter(adapter_folder, base_model)
        on_cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if on_cuda else "cpu")
        model: Any = load_peft_model(adapter.folder, find_adapter_base(adapter), adapter.labels)
        self._model = model.to(self._device, torch.bfloat16 if mode == BF16 else torch.float32)
        self._run = self._compiled() if mode == COMPILED else self._model
        self.execution = Execution(
            engine=f"PyTorch {torch.__version__.partition('+')[0]}",
            provider=torch.cuda.get_device_name() if on_cuda else "CPU",
            on_cuda=on_cuda,
            threads=threads,
            precision={EAGER: "fp32", COMPILED: "fp32, compiled", BF16: "bf16"}[mode],
            note="" if on_cuda else "PyTorch sees no GPU",
        )

    def _compiled(self) -> Any:
        """The model under `torch.compile`, for texts of any length, compiled by a first run."""
        import torch

        # A pool of compilers would take cores from the two engines.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        run = torch.compile(self._model, dynamic=True)
        arrays = dict.fromkeys(("input_ids", "attention_mask"), np.ones((1, 8), np.int64))
        if getattr(self._model.config, "type_vocab_size", 1) > 1:
            arrays["token_type_ids"] = np.zeros((1, 8), np.int64)
        try:
            self._logits(run, arrays)
        except Exception as cause:  # any error of torch's compiler, or of the C++ compiler that it calls
            raise EngineError(
                f"torch.compile does not work here ({first_line(cause)[:200]}). It needs a C++ compiler; choose another "
                "way for PyTorch."
            ) from cause
        return run

    def logits(self, arrays: Arrays) -> np.ndarray:
        """See `Backend`; the copy back to the CPU waits until the GPU is done."""
        return self._logits(self._run, arrays)

    def _logits(self, run: Any, arrays: Arrays) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}
            return run(**tensors).logits.float().cpu().numpy()

    def prompt_logits(self, arrays: Arrays, n_random: int, seed: int) -> PromptLogits:
        """Run a batch with the learned prompt, with random prompts whose vectors have the same norms, and with none."""
        import torch

        # PEFT keeps the prompt of both methods as one table of parameters.
        table: torch.Tensor = self._model.prompt_encoder["default"].embedding.weight
        learned = self.logits(arrays)
        before = table.detach().clone()
        # In P-Tuning v2 a row holds a key and a value for each layer; keys are longer than values, so each keeps its norm.
        vectors = before.view(len(before), -1, self._model.active_peft_config.token_dim)
        generator = torch.Generator().manual_seed(seed)
        randoms = []
        with torch.no_grad():
            try:
                for _ in range(n_random):
                    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
                    noise *= vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
                    table.copy_(noise.view_as(before))
                    randoms.append(self.logits(arrays))
            finally:
                table.copy_(before)
        return PromptLogits(learned, np.stack(randoms), self._logits(self._model.base_model, arrays))
