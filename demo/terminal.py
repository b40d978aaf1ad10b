"""Records what a command prints, line by line with its time, and draws the recording as one SVG that plays.

    python -m demo.terminal record docs/pictures/session.jsonl "make demo" -- python -m demo.run
    python -m demo.terminal draw docs/pictures/session.jsonl docs/pictures/session.svg

The text is what the command printed; only the name of the working folder is taken off paths. A recording's
first line is `[0.0, "$ make demo"]`, every other `[seconds since the start, line]`.
"""

import json
import os
import subprocess
import sys
import time
from html import escape
from pathlib import Path

Line = tuple[float, str]
COLUMNS, ROWS, HEIGHT_PX, WIDTH_PX = 118, 30, 17, 7.25
PLAYS_S, HOLDS_S = 24.0, 6.0
"""A recording of any length plays in 24 s; its end then stands for 6 s."""
STYLE = """
  .page { fill: #1f2328 } .bar { fill: #32383f }
  text { font: 12px Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; fill: #e6edf3 }
  .title { fill: #9198a1 } .ask { fill: #7ee787 } .head { fill: #79c0ff } .fault { fill: #ffa657 }
"""


def record(command: list[str], shown: str) -> list[Line]:
    """Run `command` to its end, echo it, and return its lines. Raises CalledProcessError where it fails."""
    start, here = time.monotonic(), f"{Path.cwd()}{os.sep}"
    rows: list[Line] = [(0.0, f"$ {shown}")]
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            rows.append((round(time.monotonic() - start, 1), line.rstrip().replace(here, "")))
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return rows


def wrapped(rows: list[Line]) -> list[Line]:
    """The same lines as a terminal of `COLUMNS` columns breaks them."""
    return [(at, text[i : i + COLUMNS]) for at, text in rows for i in range(0, max(1, len(text)), COLUMNS)]


def draw(rows: list[Line]) -> str:
    """An SVG that scrolls through the recording once a turn; without motion it shows the end."""
    lines = wrapped(rows)
    frames = _frames(lines)
    width, height = round(COLUMNS * WIDTH_PX + 32), ROWS * HEIGHT_PX + 50
    texts = "\n".join(_text(n, text) for n, (_, text) in enumerate(lines) if text)
    steps = "\n".join(f"    {100 * at:.2f}% {{ transform: translateY({_top(n)}px) }}" for at, n in frames)
    total = PLAYS_S + HOLDS_S
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    title = f"{lines[0][1]}   ({rows[-1][0]:.0f} s, shown in {PLAYS_S:.0f})"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">
  <title>{escape(lines[0][1])}: its output</title>
  <style>{STYLE}
  .lines {{ transform: translateY({_top(len(lines))}px) }}
  @media (prefers-reduced-motion: no-preference) {{
    .lines {{ animation: play {total:g}s step-end infinite }}
  }}
  @keyframes play {{
{steps}
  }}
  </style>
  <rect class="page" width="{width}" height="{height}" rx="8"/>
  <path class="bar" d="M0 28V8a8 8 0 0 1 8-8h{width - 16}a8 8 0 0 1 8 8v20z"/>
  <text class="title" x="16" y="19">{escape(title)}</text>
  <svg y="38" width="{width}" height="{ROWS * HEIGHT_PX}" viewBox="0 5 {width} {ROWS * HEIGHT_PX}">
  <g class="lines">
{texts}
  </g>
  </svg>
</svg>
"""


def _frames(lines: list[Line]) -> list[tuple[float, int]]:
    """(share of the turn, lines on the screen): one frame for a tenth of a second of the film."""
    last, share = max(lines[-1][0], 0.1), PLAYS_S / (PLAYS_S + HOLDS_S)
    frames: dict[int, int] = {}
    for n, (at, _) in enumerate(lines, 1):
        frames[round(10 * PLAYS_S * at / last)] = n
    return [(share * tick / (10 * PLAYS_S), n) for tick, n in sorted(frames.items())]


def _top(shown: int) -> int:
    """How far the page is moved, so that line `shown` is the lowest one."""
    return (ROWS - shown) * HEIGHT_PX


def _text(place: int, text: str) -> str:
    return f'    <text x="16" y="{(place + 1) * HEIGHT_PX}"{_kind(text)}>{escape(text)}</text>'


def _kind(text: str) -> str:
    for mark, kind in (("$ ", "ask"), ("[", "head"), ("  kill", "fault")):
        if text.startswith(mark):
            return f' class="{kind}"'
    return ' class="fault"' if "resumed" in text else ""


def read(path: Path) -> list[Line]:
    """A recording from its file."""
    return [(at, text) for at, text in map(json.loads, path.read_text(encoding="utf-8").splitlines())]


def main(arguments: list[str]) -> int:
    """`record FILE SHOWN -- COMMAND …` or `draw FILE SVG`."""
    match arguments:
        case ["record", path, shown, "--", *command] if command:
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in record(command, shown))
        case ["draw", recording, path]:
            text = draw(read(Path(recording))).rstrip()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    Path(path).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
