"""`PromptedClassifier`: the one definition of "base + prompt → logits"."""

import torch
from transformers import PreTrainedModel


class PromptedClassifier(torch.nn.Module):
    """A frozen encoder with a constant prompt before the text.

    What `peft.PeftModelForSequenceClassification.forward` does for P-Tuning in inference mode, with the
    prompt encoder gone: the prompt's embeddings stand before the text's, positions run through both,
    the prompt has token type 0 and is never masked, and the pooled row is row 0, virtual token 0. With
    any right padding the logits equal PEFT's.

    Attributes:
        config: the base model's configuration.
        prompt_embeddings: the learned table, shape = (n_virtual, n_hidden)
    """

    prompt_embeddings: torch.Tensor

    def __init__(self, model: PreTrainedModel, prompt_embeddings: torch.Tensor) -> None:
        super().__init__()
        self.config = model.config
        self.model = model
        self.register_buffer("prompt_embeddings", prompt_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Classify a batch of texts.

        Args:
            input_ids: shape = (n_batch, n_text), padded on the right
            attention_mask: 1 for text, 0 for padding, shape = (n_batch, n_text)
            token_type_ids: which sentence a token is of, for models that take it, shape = (n_batch, n_text)

        Returns:
            ``logits``, shape = (n_batch, n_labels)
        """
        n_batch = input_ids.shape[0]
        n_virtual = self.prompt_embeddings.shape[0]
        text = self.model.get_input_embeddings()(input_ids)
        # No unsqueeze: constant folding would swallow it, and the table's name with it.
        prompt = self.prompt_embeddings.expand(n_batch, -1, -1)
        inputs = {
            "inputs_embeds": torch.cat([prompt, text], dim=1),
            "attention_mask": torch.cat([attention_mask.new_ones(n_batch, n_virtual), attention_mask], dim=1),
        }
        if token_type_ids is not None:
            inputs["token_type_ids"] = torch.cat([token_type_ids.new_zeros(n_batch, n_virtual), token_type_ids], dim=1)
        return {"logits": self.model(**inputs).logits}
