"""Plots and tables show the numbers of the report, and nothing else happens."""

import copy
import itertools
import os
import runpy
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from benchmarks import quality_plots
from benchmarks.quality_plots import Difference, Point, Series
from flatlora_diffusion.common.errors import UserError
from flatlora_diffusion.evaluate import figures, plots, tables
from flatlora_diffusion.evaluate.figures import COLOURS, MUTED, WIDTH, wrapped
from flatlora_diffusion.evaluate.plots import PLOTS, plane, rise, tradeoff, write_plots
from flatlora_diffusion.evaluate.tables import decimals, markdown, markdown_table, significant
from tests.tiny import global_rng_state

ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]
SIGMAS = [0.1, 0.3]
SCALES = [0.0, 0.5, 1.0, 1.2]
LONG = "Flat-LoRA | sigma 0.3, constant"


def made_up(heldout: float, retention: float, curvature: float) -> dict:
    """What would be measured of a method: losses of the two bands are 3/2 and 1/2 of the held-out loss."""
    squares = np.square(ALPHAS)
    rises = [{"sigma": s, "rise": curvature * s**2, "standard_error": curvature * s / 50} for s in SIGMAS]
    return {
        "heldout": {
            "loss": heldout,
            "bands": [
                {"from": 0, "to": 500, "loss": 1.5 * heldout},
                {"from": 500, "to": 1000, "loss": 0.5 * heldout},
            ],
        },
        "train_loss": 0.125,
        "clip_i": 0.7004,
        "nearest_training": {"drawn": 0.81, "true": 0.83},
        "retention": {"loss": retention, "clip_t": 0.28, "drift": 0.05, "pixel_drift": 0.1},
        "flatness": {
            "loss": 0.125,
            "rise": rises,
            # Two directions, of which the second is twice as steep.
            "line": {
                "alphas": ALPHAS,
                "losses": [(0.125 + k * curvature * squares).tolist() for k in (1, 2)],
            },
            # Steep along the first direction only.
            "plane": {
                "alphas": ALPHAS,
                "losses": (0.125 + curvature * squares[:, None] + 0 * squares).tolist(),
            },
            "top_eigenvalue": 12.3456,
        },
        "tradeoff": [
            {
                "scale": s,
                "heldout_loss": 0.2 + (heldout - 0.2) * s,
                "retention_loss": 0.1 + (retention - 0.1) * s**2,
            }
            for s in SCALES
        ],
    }


@pytest.fixture
def report() -> dict:
    methods = {
        "base": made_up(0.2, 0.1, 0.4),
        "LoRA": made_up(0.19, 0.102, 0.5),
        LONG: made_up(0.18, 0.101, 0.25),
    }
    methods["base"]["tradeoff"] = None
    return {"base": "demo", "settings": {}, "methods": methods}


# The plots of a report.


def colours(artists) -> list[str]:
    return [to_hex(artist.get_facecolor()) for artist in artists]


def test_bands_are_changes_in_percent_of_the_bases(report):
    report["methods"]["LoRA"]["heldout"]["bands"][1]["loss"] = 0.11
    (axes,) = plots.bands(report).axes
    one, other = axes.containers
    # 0.285 / 0.3, 0.11 / 0.1; 0.27 / 0.3, 0.09 / 0.1
    np.testing.assert_allclose([bar.get_height() for bar in one], [-5, 10])
    np.testing.assert_allclose([bar.get_height() for bar in other], [-10, -10])
    assert [c[0] for c in map(colours, (one, other))] == [c.lower() for c in COLOURS[:2]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0-500", "500-1000"]
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in (*one, *other))
    assert all(end < start for (_, end), (start, _) in itertools.pairwise(spans))
    assert [(a + d) / 2 for (a, _), (_, d) in zip(spans[::2], spans[1::2], strict=True)] == pytest.approx(
        [0, 1]
    )


def test_rises_have_their_standard_errors(report):
    left, right = rise(report).axes
    for container, by_square, curvature in zip(
        left.containers, right.containers, (0.4, 0.5, 0.25), strict=True
    ):
        for (line, _, (bars,)), power in ((container, 2), (by_square, 0)):
            means = [curvature * s**power for s in SIGMAS]
            errors = [curvature * s ** (power - 1) / 50 for s in SIGMAS]
            np.testing.assert_allclose(line.get_data(), [SIGMAS, means])
            for segment, mean, error in zip(bars.get_segments(), means, errors, strict=True):
                np.testing.assert_allclose(segment[:, 1], [mean - error, mean + error])
    assert left.get_ylim()[0] == 0
    report["methods"]["LoRA"]["flatness"]["rise"][0]["rise"] = -0.01
    left, _ = rise(report).axes
    assert left.get_ylim()[0] < -0.01


def test_lines_are_means_within_the_least_and_the_greatest(report):
    (axes,) = plots.line(report).axes
    for line, band, curvature in zip(axes.lines, axes.collections, (0.4, 0.5, 0.25), strict=True):
        squares = curvature * np.square(ALPHAS)
        np.testing.assert_allclose(line.get_data(), [ALPHAS, 0.125 + 1.5 * squares])
        corners = band.get_paths()[0].vertices
        for alpha, square in zip(ALPHAS, squares, strict=True):
            heights = corners[np.isclose(corners[:, 0], alpha), 1]
            assert (heights.min(), heights.max()) == pytest.approx((0.125 + square, 0.125 + 2 * square))
    assert len({line.get_color() for line in axes.lines}) == 3


def test_planes_share_levels_and_colours(report):
    *panels, bar = plane(report).axes
    assert [panel.get_title(loc="left").replace("\n", " ") for panel in panels] == list(report["methods"])
    surfaces = [panel.collections[0] for panel in panels]
    for surface in surfaces:
        np.testing.assert_array_equal(surface.levels, surfaces[0].levels)
        assert surface.get_clim() == surfaces[0].get_clim()
        np.testing.assert_array_equal(surface.get_facecolor(), surfaces[0].get_facecolor())
    # The steepest reaches 0.625, all start at 0.125.
    assert surfaces[0].levels[0] <= 0.125 and surfaces[0].levels[-1] >= 0.625
    assert bar.get_ylim() == (surfaces[0].levels[0], surfaces[0].levels[-1])


def test_the_first_direction_of_a_plane_is_to_the_right(report):
    panel = plane(report).axes[1]
    contours = panel.collections[1]
    drawn = [path.vertices for path in contours.get_paths() if len(path.vertices)]
    assert drawn
    for vertices in drawn:  # steep along x only: upright lines
        assert np.ptp(np.abs(vertices[:, 0])) < 1e-6 and np.ptp(vertices[:, 1]) == pytest.approx(2)


def test_losses_that_are_no_numbers_leave_gaps(report):
    lora = report["methods"]["LoRA"]
    lora["flatness"]["plane"]["losses"][0][0] = lora["tradeoff"][1]["heldout_loss"] = float("nan")
    *panels, _ = plane(report).axes
    assert np.isfinite(panels[0].collections[0].levels).all()
    (axes,) = tradeoff(report).axes
    assert sorted(text.get_text() for text in axes.texts) == ["0.5", "1.2", "1.2"]


def test_the_tradeoff_is_a_curve_a_method_with_scale_1_emphasised(report):
    (axes,) = tradeoff(report).axes
    curves = {line.get_label(): line for line in axes.lines if line.get_linestyle() != "None"}
    assert list(curves) == ["LoRA", LONG]
    np.testing.assert_allclose(curves["LoRA"].get_data()[0], [0.2, 0.195, 0.19, 0.188])
    np.testing.assert_allclose(curves["LoRA"].get_data()[1], [0.1, 0.1005, 0.102, 0.10288])
    emphasised = [line for line in axes.lines if line.get_markersize() == 10]
    np.testing.assert_allclose([np.ravel(p.get_data()) for p in emphasised], [[0.19, 0.102], [0.18, 0.101]])
    (start,) = (line for line in axes.lines if line.get_label() == "base")
    assert np.ravel(start.get_data()).tolist() == [0.2, 0.1] and start.get_color() == MUTED
    assert sorted(text.get_text() for text in axes.texts) == ["0.5", "0.5", "1.2", "1.2"]


def test_a_method_has_its_colour_whatever_others_lack(report):
    report["methods"]["LoRA"]["flatness"]["line"] = None
    (axes,) = plots.line(report).axes
    assert [line.get_color() for line in axes.lines] == [MUTED, COLOURS[1]]
    looks = [figures.look(index) for index in range(19)]
    assert len({tuple(look.items()) for look in looks}) == 19


PARTS = {
    "bands.png": ("heldout", "bands"),
    "rise.png": ("flatness", "rise"),
    "line.png": ("flatness", "line"),
    "plane.png": ("flatness", "plane"),
    "tradeoff.png": ("tradeoff",),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_was_not_measured_is_not_drawn(report, name):
    for measures in report["methods"].values():
        *outer, key = PARTS[name]
        for step in outer:
            measures = measures[step]
        measures[key] = None
    assert PLOTS[name](report) is None
    for measures in report["methods"].values():
        measures[PARTS[name][0]] = None
    assert PLOTS[name](report) is None
    for measures in report["methods"].values():
        measures.clear()
    assert PLOTS[name](report) is None


def test_what_compares_with_the_base_needs_it(report):
    report["methods"]["base"]["heldout"] = None
    assert plots.bands(report) is None
    (axes,) = tradeoff(report).axes
    assert "base" not in [line.get_label() for line in axes.lines]
    alone = {"methods": {"base": made_up(0.2, 0.1, 0.4)}}
    assert plots.bands(alone) is None and tradeoff(alone) is None


# Files.


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 30)


def keep_only(report: dict, *keys: str) -> None:
    """Leave nothing but these measures of flatness."""
    for name, own in report["methods"].items():
        report["methods"][name] = {"flatness": {key: own["flatness"][key] for key in keys}}


@pytest.mark.slow
def test_files_are_written_for_what_is_there_and_always_the_same(report, tmp_path, coarse):
    keep_only(report, "rise", "line")
    unchanged = copy.deepcopy(report)
    paths = write_plots(report, tmp_path)
    assert paths == [tmp_path / name for name in ("rise.png", "line.png")]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    first = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_plots(report, tmp_path)] == first
    assert report == unchanged
    with Image.open(paths[0]) as picture:
        assert picture.width == 30 * WIDTH
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # in a dark README too


def test_a_file_that_cannot_be_written_leaves_the_old_one(report, tmp_path, coarse, monkeypatch):
    keep_only(report, "rise", "line")
    (tmp_path / "rise.png").write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"rise\.png: cannot be written \(No space left on device\)"):
        write_plots(report, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rise.png"]
    assert (tmp_path / "rise.png").read_bytes() == b"old"


def test_without_matplotlib_one_line_says_what_to_do(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UserError, match=r"^drawing plots needs the package matplotlib: pip install matplotlib$"
    ):
        write_plots(report, tmp_path)
    assert not list(tmp_path.iterdir())
    for module in (figures, plots, tables, quality_plots):  # only drawing needs it
        runpy.run_path(module.__file__)
    assert markdown(report)


def test_nothing_global_changes_and_the_users_style_does_not_matter(report, tmp_path, coarse):
    pyplot = sys.modules.get("matplotlib.pyplot")
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.grid": False, "savefig.facecolor": "black"}):
        # Its own comparison would choose a backend.
        settings, state = dict(dict.items(matplotlib.rcParams)), global_rng_state()
        (axes,) = plots.line(report).axes
        keep_only(report, "line")
        styled = write_plots(report, tmp_path)
        assert dict(dict.items(matplotlib.rcParams)) == settings and global_rng_state() == state
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert axes.lines[0].get_linewidth() == 1.8
    with Image.open(styled[0]) as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


# Labels.


def test_labels_cover_neither_each_other_nor_the_frame():
    places = np.repeat(np.random.default_rng(0).normal(size=(5, 2)), 3, axis=0)  # three arms at each point
    points = [
        Point("arms", f"a method with sigma {i}", (x, x - 0.1, x + 0.1), (y, y - 0.1, y + 0.1))
        for i, (x, y) in enumerate(places)
    ]
    figure = quality_plots.scatter(points, "held-out loss", "retention loss")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [point.label for point in points]
    for box in boxes:
        assert frame.containsx(box.x0) and frame.containsx(box.x1)
        assert frame.containsy(box.y0) and frame.containsy(box.y1)
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("LoRA", "LoRA"),
        ("SAM on the merged weights", "SAM on the\nmerged weights"),
        ("my_long_adapter_name_v2", "my_long_\nadapter_name_\nv2"),
        ("", ""),
    ],
)
def test_long_labels_are_broken(text, lines):
    assert wrapped(text, 15) == lines


# The plots of the benchmark.


def test_a_forest_shows_each_interval_and_whether_it_reaches_zero():
    rows = [
        Difference("mild", "Flat-LoRA 0.1", -1.5, -2.5, -0.5, 5),
        Difference("mild", "Flat-LoRA 0.3", -0.25, -0.5, 1, 5),
        Difference("rivals", "SAM", 2, 1.5, 12, 4),
    ]
    (axes,) = quality_plots.forest(rows, "Held-out loss", "%").axes
    intervals = [line for line in axes.lines if len(line.get_xdata()) == 2][:3]
    means = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert [list(line.get_xdata()) for line in intervals] == [[-2.5, -0.5], [-0.5, 1], [1.5, 12]]
    assert [line.get_xdata()[0] for line in means] == [-1.5, -0.25, 2]
    expected = [quality_plots.BETTER, MUTED, quality_plots.WORSE]
    assert [line.get_color() for line in means] == [line.get_color() for line in intervals] == expected
    heights = [line.get_ydata()[0] for line in means]
    assert list(axes.get_yticks()) == heights == sorted(heights) and axes.yaxis_inverted()  # from the top
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [row.label for row in rows]
    assert [text.get_text() for text in axes.texts] == [
        "mild",
        "−1.5  [−2.5, −0.5]  n=5",  # noqa: RUF001
        "−0.2  [−0.5, +1.0]  n=5",  # noqa: RUF001
        "rivals",
        "+2.0  [+1.5, +12.0]  n=4",
    ]


def test_a_scatter_has_intervals_both_ways():
    points = [Point("mild", "LoRA", (1, 0.9, 1.2), (3, 2.5, 4)), Point("rivals", "SAM", (2, 1, 3), (5, 4, 6))]
    (axes,) = quality_plots.scatter(points, "x", "y").axes
    drawn = [np.transpose(line.get_data()).tolist() for line in axes.lines]
    assert drawn[:3] == [[[0.9, 3], [1.2, 3]], [[1, 2.5], [1, 4]], [[1, 3]]]
    assert drawn[3:] == [[[1, 5], [3, 5]], [[2, 4], [2, 6]], [[2, 5]]]
    assert axes.lines[0].get_color() == axes.lines[2].get_color() != axes.lines[5].get_color()


def test_connected_groups_have_a_line_through_their_points_in_order():
    ends = [("a", 3), ("b", 2), ("a", 1), ("b", 5), ("a", 2)]
    points = [Point(group, str(x), (x, x - 0.1, x + 0.1), (-x, -x - 0.1, -x + 0.1)) for group, x in ends]
    alone, connected = (quality_plots.scatter(points, "x", "y", groups).axes[0] for groups in ((), ("a",)))
    (line,) = connected.lines[len(alone.lines) :]
    np.testing.assert_array_equal(line.get_data(), [[3, 1, 2], [-3, -1, -2]])
    assert line.get_color() == connected.lines[2].get_color() != connected.lines[5].get_color()


def test_curves_over_sigma_have_their_intervals():
    values = [(-1.0, -2.0, 0.5), (-3.0, -5.0, -2.0)]
    series = [Series("cosine", SIGMAS, values), Series("constant", SIGMAS[:1], values[:1])]
    (axes,) = quality_plots.curves(series, "%", 0.0).axes
    plain, cosine, constant = axes.lines
    assert list(plain.get_ydata()) == [0, 0]
    np.testing.assert_array_equal(cosine.get_data(), [SIGMAS, [-1, -3]])
    np.testing.assert_array_equal(constant.get_data(), [[0.1], [-1]])
    ends = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert ends == [[[0.1, -2], [0.1, 0.5]], [[0.3, -5], [0.3, -2]]]
    low, high = axes.get_ylim()
    assert low < -5 and high > 0.5
    assert list(axes.get_xticks()) == SIGMAS


# Tables.


def cells(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without the line below its header."""
    lines = [line.replace(r"\|", "/").strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for place, line in enumerate(lines) if place != 1]


def tables_of(report: dict) -> list[list[list[str]]]:
    paragraphs = markdown(report).split("\n\n")
    return [cells(text) for text in paragraphs if text.startswith("|")]


def test_the_summary_has_every_measure(report):
    summary = tables_of(report)[0]
    assert [dict(zip(summary[0], row, strict=True)) for row in summary[1:]] == [
        {
            "method": name,
            "held-out loss ↓": loss,
            "held-out change ↓": change,
            "training loss": "0.1250",
            "CLIP-I ↑": "0.700",
            "nearest training icon ↓ (drawn / true)": "0.810 / 0.830",
            "retention loss ↓": retention,
            "retention change ↓": retention_change,
            "CLIP-T ↑": "0.280",
            "drift ↓": "0.050",
            "rise at sigma 0.1 ↓": small,
            "rise at sigma 0.3 ↓": large,
            "top eigenvalue ↓": "12.35",
        }
        for name, loss, change, retention, retention_change, small, large in (
            ("base", "0.2000", "-", "0.1000", "-", "3.20%", "28.8%"),
            ("LoRA", "0.1900", "-5.00%", "0.1020", "+2.00%", "4.00%", "36.0%"),
            (LONG.replace("|", "/"), "0.1800", "-10.00%", "0.1010", "+1.00%", "2.00%", "18.0%"),
        )
    ]


def test_bands_and_scales_have_tables(report):
    _, bands, scales = tables_of(report)
    assert bands == [
        ["method", "0-500 ↓", "500-1000 ↓"],
        ["base", "0.3000", "0.1000"],
        ["LoRA", "0.2850 (-5.00%)", "0.09500 (-5.00%)"],
        [LONG.replace("|", "/"), "0.2700 (-10.00%)", "0.09000 (-10.00%)"],
    ]
    assert scales[0] == ["method", "scale", "held-out loss ↓", "retention loss ↓"]
    assert scales[4] == ["LoRA", "1.2", "0.1880 (-6.00%)", "0.1029 (+2.88%)"]
    assert len(scales) == 1 + 2 * len(SCALES)


def test_only_what_was_measured_has_columns(report):
    base, lora, flat = report["methods"].values()
    for own in (base, lora, flat):
        del own["tradeoff"], own["heldout"]["bands"], own["retention"], own["flatness"]
        own["nearest_training"] = own["clip_i"] = None
    lora["heldout"] = flat["train_loss"] = None
    (summary,) = tables_of(report)
    assert summary == [
        ["method", "held-out loss ↓", "held-out change ↓", "training loss"],
        ["base", "0.2000", "-", "0.1250"],
        ["LoRA", "-", "-", "0.1250"],
        [LONG.replace("|", "/"), "0.1800", "-10.00%", "-"],
    ]
    base["heldout"] = None
    assert tables_of(report)[0][3] == [LONG.replace("|", "/"), "0.1800", "-", "-"]


def test_a_table_is_aligned_and_escaped():
    assert markdown_table(["name", "s"], [["a|b\nc", "1.25"], ["d", "-"]]) == (
        "| name   |    s |\n| ------ | ---: |\n| a\\|b c | 1.25 |\n| d      |    - |"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (significant(0.12), "0.1200"),
        (significant(1234.56), "1235"),
        (significant(0.0000123456), "1.235e-05"),
        (significant(float("nan")), "nan"),
        (significant(3.14159, 3), "3.14"),
        (significant(None), "-"),
        (decimals(0.5), "0.500"),
        (decimals(None), "-"),
        (tables.change(0.99999, 1.0), "+0.00%"),
        (tables.change(1.1, 1.0), "+10.00%"),
        (tables.change(1.1, None), "-"),
    ],
)
def test_numbers_have_sensible_digits(text, expected):
    assert text == expected
