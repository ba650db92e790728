"""The subjects that several emoji sets share: their names, keywords, and what each set calls them."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from micro_chosen import SUBJECTS
from micro_fxemoji import FXEMOJI_NAMES, SKIPPED_FXEMOJI
from micro_packages import fetch, list_members, read_json

BASE_STYLES = ("noto", "noto v1", "twemoji", "emojione", "fxemoji", "fluent flat")  # what the model learns
NEW_STYLES = ("fluent 3d", "streamline")  # never shown to UNet and text encoders
STYLES = (*BASE_STYLES, *NEW_STYLES)

# The icons of the demo (assets/icons-3d): no stage sees their pictures in the new styles.
DEMO_SUBJECTS = (
    *("grinning face", "smiling face with sunglasses", "robot"),
    *("dog face", "fox", "panda", "frog", "octopus", "lady beetle"),
    *("red apple", "strawberry", "hamburger", "doughnut", "birthday cake"),
    *("crown", "wrapped gift", "light bulb", "guitar"),
    *("rocket", "sailboat", "airplane"),
    *("cactus", "sunflower"),
)

# The icons that a personalised model is measured against (assets/icons-3d-heldout). The base knows their
# flat pictures; the autoencoder sees none of their pictures in any style.
HELDOUT_SUBJECTS = (
    *("winking face", "smiling face with heart eyes", "face with tears of joy", "sleeping face"),
    *("nerd face", "cowboy hat face", "pouting face", "ghost", "alien", "skull", "red heart", "blue heart"),
    *("cat face", "pig face", "bear", "koala", "penguin", "baby chick", "tropical fish", "spouting whale"),
    *("butterfly", "snail", "turtle", "honeybee", "unicorn", "mouse face"),
    *("tulip", "rose", "four leaf clover", "mushroom", "palm tree", "evergreen tree"),
    *("banana", "watermelon", "grapes", "lemon", "tomato", "carrot", "avocado", "pizza", "french fries"),
    *("cookie", "ice cream", "cupcake", "lollipop", "hot beverage"),
    *("automobile", "fire engine", "bicycle", "helicopter", "house with garden", "full moon"),
    *("glowing star", "cloud", "fire", "snowman"),
    *("soccer ball", "basketball", "balloon", "trophy", "bell", "key", "gem stone", "alarm clock"),
)

# Streamline lacks some of them; these stand in for those (assets/icons-streamline and its held-out set).
STREAMLINE_DEMO_SUBJECTS = ("flashlight",)
STREAMLINE_HELDOUT_SUBJECTS = (
    *("elephant", "crocodile", "dolphin", "camel", "rooster", "snake"),
    *("cherries", "peach", "sushi", "bread"),
    *("umbrella", "microscope", "violin", "bomb", "castle", "tractor"),
)

# No subject is taken from these, and none of their names counts as another subject's. Streamline files a bell
# under symbols.
SKIPPED_CATEGORIES = {"Flags", "Component", "People & Body"}
SKIPPED_STREAMLINE_CATEGORIES = {"Flags", "Component"}
SKIPPED_NAME = re.compile(
    "|".join(
        (
            r"skin tone|^family|^couple|^kiss |holding hands|^clock face|o ?clock$|thirty$|facing right$",
            r"^keycap|^letter |^regional|^japanese .*button|^input |^circled m|under eighteen|^flag ",
            r"^(a|ab|b|o|cl|cool|free|id|new|ng|ok|sos|up|vs|atm) (button|sign)",
            r"^(end|back|on|soon|top) arrow|^on exclamation|^up exclamation",
            r"^(copyright|registered|trade mark|information|water closet|hundred points|cinema)$",
            r"^(plus|minus|multiply|divide)$|^(double|white|red) exclamation|^exclamation",
            r"^(aries|taurus|gemini|cancer|leo|virgo|libra|scorpio|sagittarius|capricorn)$",
            r"^(aquarius|pisces|ophiuchus)$",
            r"arrow curving|(up|down|left|right|vertical) arrows?|^(up|down|left|right) |brightness",
            r"tracks|bars|triangle pointed|pointed star|loop|asterisk|wavy dash|alternation mark",
            r"(orange|blue) diamond|\b(button|square|circle|curl|slider)$|^(locked|unlocked) with pen",
        )
    )
)
GENDERED = re.compile(r"\b(man|woman|men|women|mens|womens)\b")
VARIATION_SELECTOR = "\ufe0f"
MAX_KEYWORDS = 8


@dataclass(frozen=True)
class Subject:
    """What one emoji shows.

    Attributes:
        code: its code points, lower-case and hyphenated.
        names: the Unicode (CLDR) name first, then the character's old name and the sets' own names.
        keywords: CLDR and user keywords, none of which is a name.
        icons: the icon's name in each style that has it.
    """

    code: str
    names: tuple[str, ...]
    keywords: tuple[str, ...]
    icons: dict[str, str]

    @property
    def name(self) -> str:
        """The name that captions use most."""
        return self.names[0]


def clean_name(name: str) -> str:
    """Lower-case words, separated by single spaces."""
    return " ".join(
        re.sub(r"[^a-z0-9']+", " ", name.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")).split()
    )


def _bare(code: str) -> str:
    """Code points without the variation selector, which sets write or leave out."""
    return code.replace("-fe0f", "")


def _slug(name: str) -> str:
    """A name as icons have it: ``jack-o-lantern``."""
    return re.sub(r"[^a-z0-9]+", "-", name.replace("'", "")).strip("-")


def _find_icons(slugs: list[str], sets: dict[str, dict]) -> dict[str, str]:
    """In each set of vectors the icon that has the first of these names that any icon has.

    Streamline numbers its variants (``fox-face-1``) and says ``-face`` where others don't; its flags are
    named as countries are, turkey among them. Firefox's names have a table of their own.
    """
    found = {}
    for style, icon_set in sets.items():
        names = list(slugs)
        if style == "fxemoji":
            by_table = [FXEMOJI_NAMES[slug] for slug in slugs[:1] if slug in FXEMOJI_NAMES]
            taken = set(FXEMOJI_NAMES.values())
            names = by_table or [flat for slug in slugs if (flat := slug.replace("-", "")) not in taken]
        elif style == "streamline":
            names = [name + end for name in slugs for end in ("", "-1", "-face", "-face-1")]
        known = icon_set["icons"].keys() - icon_set["skipped"]
        name = next((name for name in names if name in known), None)
        if name:
            found[style] = name
    return found


def _read_sets(raw: Path) -> dict[str, dict]:
    sets = {}
    for style in STYLES:
        if style != "fluent 3d":
            sets[style] = read_json(style, "icons.json", raw)
            categories = read_json(style, "metadata.json", raw)["categories"]
            skipped = SKIPPED_STREAMLINE_CATEGORIES if style == "streamline" else SKIPPED_CATEGORIES
            sets[style]["skipped"] = {name for category in skipped for name in categories.get(category, [])}
    sets["fxemoji"]["skipped"] |= SKIPPED_FXEMOJI
    return sets


def _is_wanted(code: str, name: str) -> bool:
    return not (SKIPPED_NAME.search(name) or ("-200d-" in code and GENDERED.search(name)))


def _old_names(code: str, icon: str, sets: dict[str, dict]) -> list[str]:
    """The character's own name (``heavy black heart``), and the icon's other names in all sets."""
    points = [int(point, 16) for point in _bare(code).split("-")]
    names = [unicodedata.name(chr(points[0]), "")] if len(points) == 1 else []
    names += [
        alias
        for icon_set in sets.values()
        for alias, entry in icon_set.get("aliases", {}).items()
        # Where there is more, the picture is turned or mirrored.
        if entry == {"parent": icon}
    ]
    return [clean_name(name) for name in names if name]


def _read_words(raw: Path) -> dict[str, list[str]]:
    """The name and keywords of each emoji, in Unicode's order."""
    return {
        emoji.replace(VARIATION_SELECTOR, ""): [clean_name(word) for word in found]
        for emoji, found in read_json("keywords", "dist/emoji-en-US.json", raw).items()
    }


def _read_entries(words: dict[str, list[str]], skipped: set[str], raw: Path) -> list[tuple[str, str, str]]:
    """Emoji, code and noto's name of all that is worth learning, in the order of ``words``."""
    entries = {}
    for code, icon in read_json("noto", "chars.json", raw).items():
        emoji = "".join(chr(int(point, 16)) for point in _bare(code).split("-"))
        if emoji in words and icon not in skipped and _is_wanted(code, clean_name(icon)):
            entries[emoji] = (emoji, code, icon)
    return [entries[emoji] for emoji in words if emoji in entries]


def read_subjects(raw: Path) -> list[Subject]:
    """The chosen subjects, in Unicode's order.

    A second name or keyword that is the first name of another subject is dropped: ``dog`` is the whole
    animal, so it is not kept as a second name of ``dog face``.
    """
    words, sets = _read_words(raw), _read_sets(raw)
    in_3d = {_bare(Path(member).stem): member for member in list_members(fetch("fluent 3d", raw))}
    entries = _read_entries(words, sets["noto"]["skipped"], raw)
    first_names = {name for emoji, _, icon in entries for name in (words[emoji][0], clean_name(icon))}
    subjects, taken = [], set()
    for emoji, code, icon in entries:
        first, *keywords = words[emoji]
        if first not in SUBJECTS or first in taken:  # two characters may have one name
            continue
        taken.add(first)
        others = [name for name in _old_names(code, icon, sets) if name not in first_names]
        icons = _find_icons([icon, *map(_slug, (first, *others))], sets)
        if _bare(code) in in_3d:
            icons["fluent 3d"] = in_3d[_bare(code)]
        names = [first, *(text for text in (clean_name(icon), *others) if re.fullmatch(r"[a-z ]{2,}", text))]
        kept = dict.fromkeys(
            word
            for word in keywords
            if word not in {*names, *first_names} and re.fullmatch(r"[a-z ]{3,}", word)
        )
        subjects.append(Subject(code, tuple(dict.fromkeys(names)), tuple(kept)[:MAX_KEYWORDS], icons))
    return subjects
