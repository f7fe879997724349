"""The card of an adapter on the Hugging Face hub: which model it belongs to, and how to use it."""

from huggingface_hub import ModelCard, ModelCardData

TEXT = """---
{data}
---

# Exit adapter of {base} after layer {exit_layer}

One decoder layer ({block} block, width {width}) that reads the state of `{base}` after its first {exit_layer} layers and shares its
`lm_head`. It drafts tokens for speculative decoding, or checks them; the text stays the base model's own.

```python
import cats

model = cats.load("{base}", {{"draft": "{name}"}})  # or "shallow", for a shallow verifier at a later exit
answer = model.chat("Explain why the sea is salty.").text
```

Beside a model that transformers loaded: `model.generate(..., custom_generate=cats.transformers_generate(adapters={{"draft": "{name}"}}))`.
{description}"""


def card_of(name: str, base: str, exit_layer: int, block: str, width: int, license_name: str | None, description: str) -> ModelCard:
    """The card of the adapter that will be called `name` on the hub."""
    data = ModelCardData(
        base_model=base, library_name="cats", license=license_name, tags=["speculative-decoding", "early-exit", "draft-model"]
    )
    about = {"name": name, "base": base, "exit_layer": exit_layer, "block": block, "width": width}
    return ModelCard(TEXT.format(data=data.to_yaml(), description=description and f"\n{description}\n", **about))
