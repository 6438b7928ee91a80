"""Draw the result of a run as an SVG picture of the terminal, for the README.

python tools/draw_result.py runs/boolean_synthetic-... docs/quickstart.svg

The picture names the run as it is named here: call this in the folder that holds `runs`, with a relative path.
"""

import io
import re
from pathlib import Path

import click
from rich.console import Console

import tale_ray
from tale_ray.results.tables import run_table


@click.command()
@click.argument("run")
@click.argument("out", type=click.Path(path_type=Path))
def main(run: str, out: Path) -> None:
    """Draw RUN to the file OUT."""
    console = Console(record=True, width=120, file=io.StringIO(), highlight=False)
    console.print(run_table(tale_ray.open_run(run).summary))
    picture = console.export_svg(title="tale-ray search --model bundled", unique_id="tale-ray")
    picture = re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL)  # shown without fetching a font
    out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
