"""Displays are pure: from plain data to text, HTML and figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from djinn_nb.display import finished_html, stop_html
from djinn_nb.lines import finished_text, session_text, stop_line, stop_text
from djinn_nb.plots import MAX_TOKENS, norm_heat_map, png, visible
from djinn_nb.view import LensRow, StopView
from kernel_server.protocol import messages as m

MODEL = m.ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    random_weights=True,
    num_layers=6,
    hidden_size=32,
    vocab_size=512,
    max_context=512,
    dtype="bfloat16",
    device="cpu",
    num_parameters=1000,
    has_tokenizer=True,
    eos_token_ids=(),
    fingerprint={},
    config={},
    modules=(),
    load_check={},
)
TEXTS = ("<b>", " Mary", "\n", "$x$")
STOP = m.StopInfo(
    number=1,
    reason="breakpoint",
    location="layers.2.output",
    forward=0,
    first_token=0,
    end_token=4,
    layers_executed=3,
    hit_tokens=(1,),
    hit_breakpoints=(1,),
)
SESSION = m.SessionInfo(
    id="s1",
    name="s1",
    owner="me",
    status="stopped",
    tokens=(4, 5, 6, 7),
    num_prompt_tokens=4,
    max_new_tokens=8,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    forward=0,
    location="layers.2.output",
    layers_executed=3,
    layers_replayed=0,
    stop_number=1,
    stop=STOP,
    finish_reason=None,
    error=None,
    parent=None,
    num_pages=1,
    kv_bytes=1,
    revision=1,
    event_seq=1,
    breakpoints=(
        m.BreakpointInfo(
            id=1, location="layers.2.output", when="any", condition="norm > 3", ignore=0,
            once=False, enabled=True, hits=1, held=1, stops=1,
        ),
    ),
)  # fmt: skip
VIEW = StopView(
    model=MODEL,
    session=SESSION,
    stop=STOP,
    texts=TEXTS,
    summary="layers.2.output [4, 32] bfloat16 · norm 3.1",
    norm=np.linspace(0.5, 200, 16, dtype=np.float32).reshape(4, 4),
    norm_locations=("embedding", "layers.0.output", "layers.1.output", "layers.2.output"),
    norm_first_token=0,
    lens=(LensRow(token_id=9, text=" <i>", probability=0.75),),
    lens_position=3,
    lens_entropy=1.5,
)


class _Reader(HTMLParser):
    """The text, the tags still open, and the tags that were used."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag != "img":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _read(html: str) -> _Reader:
    reader = _Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_a_stop_as_text_says_where_why_what_and_that_the_weights_are_random():
    text = stop_text(VIEW)

    for part in (
        "stopped at layers.2.output (breakpoint), forward 0 (prefill, 4 tokens)",
        "3 of 6 layers run",
        "random weights",
        "if norm > 3",
        "held at position 1",
        "' <i>' 0.750",
        "1.50 nats",
    ):
        assert part in text


def test_a_stop_as_html_is_whole_escaped_and_explains_its_colours():
    reader = _read(stop_html(VIEW))

    assert "b" in reader.tags  # our own headline
    assert "i" not in reader.tags  # a token's text is no markup
    for part in ("<b>", " <i>", "random weights", "held there", "the last token fed",
                 "run in this forward", "entropy 1.50 nats", "0 to 1"):  # fmt: skip
        assert part.replace(" ", "") in reader.text.replace(" ", "").replace("·", "")


def test_the_panel_holds_no_script_and_fetches_nothing():
    html = stop_html(VIEW)

    assert "<script" not in html
    assert "http" not in html
    assert "src='data:image/png;base64," in html


def test_a_stop_inside_a_layer_says_what_it_has_and_what_going_on_does():
    layout = m.SiteLayout(site="attention.heads", heads=4, width=8)
    stop = replace(STOP, location="layers.3.attention.heads")
    inside = replace(
        VIEW,
        model=replace(MODEL, sites=((layout,),) * 6),
        stop=stop,
        session=replace(SESSION, layers_replayed=2, stop=stop),
    )

    reader = _read(stop_html(inside))
    for shown in (stop_text(inside), reader.text, stop_line(inside.model, inside.session, TEXTS)):
        assert "inside layer 3, attention.heads [tokens, 4 heads, 8]" in shown
        assert "runs the layer again from its input, 2 layers replayed so far" in shown
    assert "dashed: run in part" in reader.text
    assert "inside" not in stop_text(VIEW) + _read(stop_html(VIEW)).text


def test_an_error_and_a_refused_lens_are_shown():
    error = m.ErrorInfo(code="OutOfPages", message="needs 3 pages, 1 is free")
    broken = replace(
        VIEW, stop=replace(STOP, reason="exception", error=error), lens=(), lens_refusal="no head"
    )

    for shown in (stop_text(broken), _read(stop_html(broken)).text):
        assert "OutOfPages: needs 3 pages, 1 is free" in shown
        assert "no lens: no head" in shown


def test_without_a_tokenizer_ids_are_shown():
    bare = replace(VIEW, texts=("",) * 4, lens=(LensRow(token_id=9, text="", probability=0.75),))

    assert "ids [4, 5, 6, 7]" in stop_text(bare)
    assert "id 9" in _read(stop_html(bare)).text


def test_a_long_forward_is_cut_and_says_so():
    count = 3000
    long = replace(
        VIEW,
        session=replace(SESSION, tokens=tuple(range(count))),
        stop=replace(STOP, end_token=count, hit_tokens=tuple(range(count))),
        texts=("x",) * count,
        norm=np.ones((4, count), np.float32),
    )

    assert "earlier tokens" in _read(stop_html(long)).text
    assert len(stop_text(long)) < 2000


def test_the_end_of_a_generation_shows_its_text():
    ended = replace(SESSION, status="finished", finish_reason="eos", num_prompt_tokens=2)

    assert "finished (eos), 2 tokens generated" in finished_text(MODEL, ended, ("<b>", " Mary"))
    assert "<b> Mary" in _read(finished_html(MODEL, ended, ("<b>", " Mary"))).text
    assert "ids [6, 7]" in finished_text(MODEL, ended, ("", ""))


def test_a_session_shows_its_exact_ids():
    text = session_text(MODEL, SESSION, TEXTS)

    assert "prompt, 4 tokens: [4, 5, 6, 7]" in text
    assert "<b>|·Mary|⏎|$x$" in text
    assert "breakpoint 1: layers.2.output, if norm > 3" in text


@pytest.mark.parametrize(
    "norm",
    [
        np.full((2, 3), np.nan),
        np.zeros((2, 3)),
        np.ones((2, 3)),
        np.array([[1.0, np.inf, np.nan]]),
        np.random.default_rng(0).lognormal(size=(81, MAX_TOKENS + 500)),
    ],
    ids=["nan", "zero", "constant", "mixed", "large"],
)
def test_any_norms_can_be_drawn(norm):
    rows, columns = norm.shape
    names = [f"layers.{i}.output" for i in range(rows)]

    figure = norm_heat_map(norm, names, range(columns), ["日本", "$"] * (columns // 2 + 1))

    assert png(figure).startswith(b"\x89PNG")


def test_a_short_forward_takes_less_room_than_a_long_one_and_its_title_fits():
    def width_of(columns):
        norm = np.random.default_rng(0).lognormal(size=(9, columns))
        names = [f"layers.{i}.output" for i in range(9)]
        title = "norm of each token's vector, forward 12"
        figure = norm_heat_map(norm, names, range(columns), [" Mary"] * columns, title=title)
        figure.canvas.draw()
        above = figure._suptitle or figure.axes[0].title
        assert above.get_text().replace("\n", " ") == title
        box = above.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        return figure.axes[0].get_window_extent().width

    assert width_of(1) < width_of(15) / 3


def test_the_heat_map_names_its_units_and_what_it_left_out():
    norm = np.random.default_rng(0).lognormal(size=(3, MAX_TOKENS + 4))

    figure = norm_heat_map(norm, ["embedding", "layers.0.output", "x"], range(MAX_TOKENS + 4))

    axes, bar = figure.axes
    assert "L2 norm (log scale)" in bar.get_ylabel()
    assert f"the last {MAX_TOKENS} of {MAX_TOKENS + 4} tokens" in axes.get_xlabel()


def test_drawing_does_not_touch_pyplot():
    code = (
        "import sys, numpy as np\n"
        "from djinn_nb.plots import norm_heat_map, png\n"
        "png(norm_heat_map(np.ones((2, 2)), ['a', 'b'], [0, 1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_spaces_and_line_ends_are_made_visible():
    assert visible(" a\n\x07") == "·a⏎�"
