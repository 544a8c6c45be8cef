"""The gallery as HTML. Right and wrong are told by a sign and a word, not by colour alone."""

from __future__ import annotations

from collections.abc import Sequence

from clipa_fast.report.gallery import Answer, Gallery, NameQuery, PictureQuery
from clipa_fast.report.markup import escape, percent, picture

_MARKS = {"right": "✓", "alike": "≡", "wrong": "✗"}
_WORDS = {"right": "right", "alike": "right, looks identical", "wrong": "wrong"}
_LEGEND = {"right": "right", "alike": "another name for an identical picture, counted as right", "wrong": "wrong"}


def gallery_sections(gallery: Gallery) -> str:
    """Everything there is: pictures answered right, answered wrong, then names."""
    total = gallery.num_right + gallery.num_wrong
    parts = []
    if gallery.description:
        parts.append(f"<p>{escape(gallery.description)}</p>")
    share = f" ({percent(gallery.num_right / total)})" if total else ""
    parts.append(
        f"<p>Nothing here is picked by hand: of {total:,} pictures the first name is right for {gallery.num_right:,}"
        f"{share}; from these, from the {gallery.num_wrong:,} others and from {gallery.num_names:,} names, the ones "
        f"below were drawn uniformly at random with seed {gallery.seed}. Each shows its best answers and their "
        "cosine.</p>"
    )
    shown = {_kind(answer) for query in (*gallery.right, *gallery.wrong, *gallery.names) for answer in query.answers}
    parts.append('<p class="legend">')
    parts.append("".join(f"<span>{_mark(kind)} {escape(_LEGEND[kind])}</span>" for kind in _MARKS if kind in shown))
    parts.append("</p>")
    if gallery.right:
        parts.append(f"<h3>Pictures answered right: {len(gallery.right):,} of {gallery.num_right:,}</h3>")
        parts.append(_picture_queries(gallery.right))
    if gallery.wrong:
        parts.append(f"<h3>Pictures answered wrong: {len(gallery.wrong):,} of {gallery.num_wrong:,}</h3>")
        parts.append(_picture_queries(gallery.wrong))
    if gallery.names:
        parts.append(f"<h3>Names and the pictures they find: {len(gallery.names):,} of {gallery.num_names:,}</h3>")
        parts.append(f'<div class="cards names">{"".join(map(_name_query, gallery.names))}</div>')
    return "".join(parts)


def _picture_queries(queries: Sequence[PictureQuery]) -> str:
    return f'<div class="cards">{"".join(map(_picture_query, queries))}</div>'


def _picture_query(query: PictureQuery) -> str:
    items = "".join(
        f'<li class="{_kind(answer)}">{_mark(_kind(answer))}<span class="name">{escape(answer.name)}</span>'
        f'<span class="score">{_score(answer)}</span></li>'
        for answer in query.answers
    )
    asked = f'<p class="asked">{escape(query.name)}</p>'
    return f'<article class="query">{picture(query.picture, query.name)}<div>{asked}<ol>{items}</ol></div></article>'


def _name_query(query: NameQuery) -> str:
    tiles = []
    for answer in query.answers:
        shown = "" if answer.picture is None else picture(answer.picture, answer.name)
        name = escape(answer.name)
        tiles.append(
            f'<li class="{_kind(answer)}">{shown}<span class="line">{_mark(_kind(answer))}'
            f'<span class="score">{_score(answer)}</span></span><span class="name" title="{name}">{name}</span></li>'
        )
    return f'<article class="found"><p class="asked">{escape(query.name)}</p><ol>{"".join(tiles)}</ol></article>'


def _kind(answer: Answer) -> str:
    return ("alike" if answer.alike else "right") if answer.is_right else "wrong"


def _mark(kind: str) -> str:
    return f'<span class="mark {kind}" role="img" aria-label="{_WORDS[kind]}">{_MARKS[kind]}</span>'


def _score(answer: Answer) -> str:
    return f"{answer.score:.2f}".replace("-", "\u2212")
