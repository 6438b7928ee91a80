"""Loads checkpoints with plain transformers and says what they compute. Run by tests in a process of its own.

python plain_transformers.py REQUEST ANSWERS

REQUEST is JSON: {"prompts": [[token, ...]], "folders": {name: {"path", "options"}}}. ANSWERS gets, with torch.save, for
each name the logits (vocabulary) after each prompt, and the tokens that `generate` writes with its cache.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS = 6


def main(request: Path, answers: Path) -> None:
    """Answer a request."""
    asked = json.loads(request.read_text())
    found = {}
    for name, folder in asked["folders"].items():
        options = folder.get("options", {})
        model, loading = AutoModelForCausalLM.from_pretrained(folder["path"], output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder["path"], **options)
        logits, written = [], []
        for prompt in asked["prompts"]:
            tokens = torch.tensor([prompt])
            with torch.inference_mode():
                logits.append(model(input_ids=tokens, use_cache=False).logits[0, -1].float())
                if folder.get("generates", True):
                    new = model.generate(
                        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False
                    )
                    written.append(new[0, len(prompt) :].tolist())
        found[name] = {
            "logits": torch.stack(logits),
            "written": written,
            "missing": [*map(str, loading["missing_keys"]), *map(str, loading["unexpected_keys"])],
            "dtype": str(model.dtype),
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            "config": model.config.to_dict(),
            "generation": model.generation_config.to_dict(),
            "vocabulary": tokenizer.get_vocab(),
            "template": tokenizer.chat_template,
        }
    assert not any(module.partition(".")[0] == "tale_ray" for module in sys.modules)
    torch.save(found, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
