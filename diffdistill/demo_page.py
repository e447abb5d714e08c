"""The demo's page: Gradio on this machine alone. No share link, no telemetry, no font or script from elsewhere.

A content security policy goes with every answer: a browser that honours it asks nobody but this server.
"""

from __future__ import annotations

import base64
import html
import io
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffdistill.demo_sides import Choices, Made, Measured, Wish
from diffdistill.errors import UserError

MOST = 20  # samples of one call
TILE = 96  # pixels that a sample has at least
FRAMES_PER_SECOND = 8
HIGHEST_SEED = 2**31 - 1  # what a page's number field holds exactly
IN_TURN = "each in turn"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'self'"
)
CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
.drawn img { display: block; width: 100%; max-width: 560px; margin: 0 auto; border-radius: 6px; }
.drawn .pixels { image-rendering: pixelated; }
.drawn .empty { min-height: 180px; display: flex; align-items: center; justify-content: center; opacity: .6; }
.measured p { text-align: center; }
"""


def serve(sides: Sequence[Measured], host: str, port: int, ready: Callable[[str], None] = lambda url: None) -> None:
    """Serve the page until Ctrl-C or SIGTERM. ready: called with the address once it can be opened."""
    with tempfile.TemporaryDirectory(prefix="diffdistill-demo-") as scratch:
        # read where gradio is imported
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": scratch}
        import gradio as gr
        from starlette.middleware import Middleware

        page = build(sides)
        _, url, _ = page.launch(
            server_name=host, server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
            footer_links=[], run_history=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
            css=CSS, theme=gr.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            app_kwargs={"middleware": [Middleware(_Alone)]},
        )  # fmt: skip
        ended = threading.Event()
        # of SIGINT too: a shell's background job is told to ignore it
        before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ready(url)
            ended.wait()
        finally:
            page.close(verbose=False)
            for number, handler in before.items():
                signal.signal(number, handler)


class _Alone:
    """ASGI middleware: the policy as a header of every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


def build(sides: Sequence[Measured]) -> Any:
    """The page of one or two sides, as gradio's Blocks; the last is the student."""
    import gradio as gr

    student = sides[-1].side.choices
    with gr.Blocks(title="diffdistill demo", analytics_enabled=False) as page:
        gr.Markdown("# Teacher and student\nThe same seed, so the same noise." if len(sides) > 1 else "# Student")
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=HIGHEST_SEED, min_width=120)
            num = gr.Slider(1, MOST, value=_num(student), step=1, label="Samples", min_width=160)
            told = _chooser(gr, student)
        button = gr.Button("Generate", variant="primary")
        outputs, inputs = [], [seed, num, *([] if told is None else [told])]
        with gr.Row(equal_height=False):
            for side in sides:
                with gr.Column(min_width=300):
                    gr.Markdown(f"## {side.name.capitalize()}")
                    empty = '<div class="empty">Press Generate.</div>'
                    picture = gr.HTML(empty, elem_classes="drawn", elem_id=f"{side.name}-drawn")
                    outputs += [picture, gr.Markdown("", elem_classes="measured", elem_id=f"{side.name}-measured")]
                    inputs += _own_controls(gr, side.side.choices)
        together = gr.Markdown("", elem_classes="measured", elem_id="together")
        gr.Markdown(
            "Evaluations are counted while a call runs: every pass of the network, those of guidance too. A time is of"
            " one call for all samples shown, text encoder and decoder included, the median of so many calls. The first"
            " call with each number of samples is a warm-up that is not timed."
            f" Measured {_machine(sides[-1].side.device)}."
        )

        def generate(seed: float, num: float, *rest: Any) -> list[str]:
            values = list(rest)
            shared = _wish(seed, num, student, values.pop(0) if told is not None else None)
            wishes = [_own_wish(shared, side.side.choices, values) for side in sides]
            try:
                made = [side.make(wish) for side, wish in zip(sides, wishes, strict=True)]
            except UserError as error:
                raise gr.Error(html.escape(error.fix)) from error
            shown = [[_picture(one.images, name.name), _measure(one)] for one, name in zip(made, sides, strict=True)]
            return [*(part for pair in shown for part in pair), _compared(made)]

        gr.on([button.click, seed.submit], generate, inputs, [*outputs, together], concurrency_limit=1, api_name=False)
    return page


def _num(choices: Choices) -> int:
    """How many samples are drawn at first: one of each class while they are few."""
    return choices.num_classes if 2 <= choices.num_classes <= MOST else 1


def _chooser(gr: Any, choices: Choices) -> Any:
    """The control for what both are told; None where they are told nothing."""
    if choices.words:
        first = next(iter(choices.prompts), "")
        if not choices.prompts:
            return gr.Textbox(first, label="Prompt", min_width=260)
        return gr.Dropdown(list(choices.prompts), value=first, allow_custom_value=True, label="Prompt", min_width=260)
    if choices.num_classes:
        names = [IN_TURN, *map(str, range(choices.num_classes))]
        return gr.Dropdown(names, value=IN_TURN, label="Class", min_width=160)
    return None


def _own_controls(gr: Any, choices: Choices) -> list[Any]:
    """Controls of one side: what its sampler leaves open."""
    found = []
    if choices.steps is not None:
        found.append(gr.Slider(1, max(100, choices.steps), value=choices.steps, step=1, label="Steps"))
    if choices.guidance is not None:
        found.append(gr.Slider(0, max(10.0, choices.guidance), value=choices.guidance, step=0.1, label="Guidance"))
    return found


def _wish(seed: float, num: float, choices: Choices, told: str | None) -> Wish:
    """What both are asked for; a number field may be empty or hold anything."""
    label = int(told) if choices.num_classes and told not in (None, IN_TURN) else None
    held = min(max(int(seed or 0), 0), HIGHEST_SEED)
    return Wish(held, min(max(int(num), 1), MOST), label, (told or "") if choices.words else "")


def _own_wish(wish: Wish, choices: Choices, values: list[Any]) -> Wish:
    """`wish` with what the side's own controls hold, taken off the front of `values`."""
    steps = int(values.pop(0)) if choices.steps is not None else None
    guidance = float(values.pop(0)) if choices.guidance is not None else None
    return Wish(wish.seed, wish.num, wish.label, wish.prompt, steps, guidance)


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"on {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"on this CPU with {threads} thread{'s' if threads != 1 else ''}"


def _measure(made: Made) -> str:
    calls = f"median of {made.calls} calls" if made.calls > 1 else "one call"
    return f"**{_plural(made.nfe)}** per sample, **{_time(made.milliseconds)}** ({calls})"


def _compared(made: Sequence[Made]) -> str:
    if len(made) < 2:
        return ""
    ratio = made[0].milliseconds / made[1].milliseconds
    fewer = made[0].nfe / made[1].nfe
    return f"The student takes 1/{fewer:.3g} of the evaluations and 1/{ratio:.3g} of the time."


def _plural(nfe: float) -> str:
    return f"{nfe:g} network evaluation{'s' if nfe != 1 else ''}"


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def _picture(images: Tensor, name: str) -> str:
    """Samples as one picture inside the page: a PNG of images, a GIF of clips."""
    scale = max(1, -(-TILE // max(images.shape[-2:])))
    clips = images if images.ndim == 5 else images[:, :, None]
    frames = [_sheet(clips[:, :, index], scale) for index in range(clips.shape[2])]
    target, kind = io.BytesIO(), "PNG" if len(frames) == 1 else "GIF"
    more = {} if len(frames) == 1 else {
        "save_all": True, "append_images": frames[1:], "duration": 1000 // FRAMES_PER_SECOND, "loop": 0,
    }  # fmt: skip
    frames[0].save(target, kind, **more)
    data = base64.b64encode(target.getvalue()).decode()
    shown = ' class="pixels"' if scale > 1 else ""
    alt = f"{len(images)} sample{'s' if len(images) != 1 else ''} of the {name}"
    return f'<img{shown} alt="{alt}" src="data:image/{kind.lower()};base64,{data}">'


def _sheet(images: Tensor, scale: int) -> Image.Image:
    """Images [n, C, H, W] in [0, 1] about as many in a row as there are rows, each pixel a square of `scale`."""
    num, channels, height, width = images.shape
    columns = next(side for side in range(1, num + 1) if side * side >= num)
    columns = 5 if num in (5, 10) else columns
    rows, gap = -(-num // columns), max(2, scale // 4)
    tall, wide = height * scale + gap, width * scale + gap
    sheet = np.full((rows * tall - gap, columns * wide - gap, 3), 128, np.uint8)
    pixels = images.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    for index, tile in enumerate(pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).numpy()):
        top, left = index // columns * tall, index % columns * wide
        sheet[top : top + height * scale, left : left + width * scale] = tile
    return Image.fromarray(sheet)
