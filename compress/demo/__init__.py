"""A complete demonstration that needs no network: a small Llama, the text it was trained on, and facts that it knows.

`MODEL` is a plain Hugging Face directory with a 4.66 M parameter model in bfloat16, trained from scratch on the
interpreter's own documentation and sources (`corpus`) and on biographies of invented people (`world`) by
`python -m compress.demo.train`. `tasks.write_tasks` writes the lm-eval tasks that measure both: `demo_text` in bits
per byte on held-out text, and `demo_facts` as multiple choice. Compressing it takes seconds on any machine, and both
get worse as compression gets harsher, so every command of the package can be tried before the first download.
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
