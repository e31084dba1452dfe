"""Guessing languages by counting, without a model.

The script is the Unicode block of most letters; within Latin script, the language whose most frequent function words
occur most.
"""

import re
from bisect import bisect_right
from collections import Counter

# Characters of a row that its language is guessed from.
LANGUAGE_CHARS = 1000

# Where each Unicode block of letters begins, and its script; "-" where there is none of these.
_BLOCKS = re.findall(
    r"(\w+) ([^,]+)",
    "0 Latin, 370 Greek, 400 Cyrillic script, 530 -, 590 Hebrew, 600 Arabic script, 780 -, 900 Devanagari script, 980 -, "
    "E00 Thai, E80 -, 1100 Korean, 1200 -, 1E00 Latin, 1F00 Greek, 2000 -, 3040 Kana, 3100 -, 3400 Han, A000 -, "
    "AC00 Korean, D7B0 -",
)
_STARTS = [int(start, 16) for start, _ in _BLOCKS]

# The most frequent words that carry grammar, not meaning.
_FUNCTION_WORDS: dict[str, frozenset[str]] = {
    name: frozenset(words.split())
    for name, words in {
        "English": "the of and to a in is that it for was on are as with be by at this have from or not you what how who "
        "which where when do does i he she they we can your my an if there has me some about",
        "German": "der die das und in zu den ist nicht von mit dem des ein eine auf für im sich auch es an wie ich sie er wir "
        "was wer wo wird sind hat einen als bei oder aus nach man heißt",
        "French": "le la les de des et un une du en est que qui dans pour pas sur au avec ce il elle je nous vous se plus "
        "par sont aux cette ne à où quel quelle l d qu",
        "Spanish": "el la los las de que en un una es del por con no se para al lo como su más qué cuál está son pero "
        "yo me dónde cómo muy hay este esta",
        "Italian": "il la lo gli le di e che un una è in per non del della con si da al dei sono come più nel alla cosa chi "
        "dove ha questo i l delle ma anche o",
        "Portuguese": "o a os as de e que um uma do da em não é no na por com para se dos das mais como ao foi são qual onde "
        "você eu seu sua ou muito está",
        "Dutch": "de het een en van in is dat op te niet met voor zijn aan er wat die ik je hij naar ook om als bij hoe wie "
        "waar wordt of uit maar dit deze was heeft",
        "Polish": "i w na z nie się do to jest że jak o co po od za dla czy ten przez są ale tak gdzie kto który jego był "
        "można oraz być ma a",
    }.items()
}
# Below this share of function words it is another language: in running text of these eight they are a third or more.
_FUNCTION_WORDS_LEAST = 0.1

_CODE_LINE = re.compile(
    r"""\s*(?:
    (?:async\ )?(?:def|class|fn|func|function|struct|interface)\ \w+\ *[({:<]
    | import\ [\w.]+(?:\ as\ \w+|(?:,\ ?\w+)+)?;?$ | from\ [\w.]+\ import\b
    | \#(?:include|define|ifdef|endif)\b
    | (?:if|elif|else|for|while|with|try|except|switch)\b.*[:{]$
    | (?:SELECT|INSERT\ INTO|UPDATE\ \w+\ SET|DELETE\ FROM|CREATE\ TABLE)\b
    | [A-Za-z_][\w.\[\]"']+\ *[-+*/|]?=\ *\S
    | [\w.]+\(.*\)\ *;?$
    | [}\])]+[;,]?$
    | </?\w+[^>]*>
    | .*[()=\[\]<>].*;$ | .*{$
    ) | \s+return\b""",
    re.VERBOSE,
)


def language_of(text: str) -> str:
    """Guess the language of ``text``: "code" if most of it looks like that, else by script and function words.

    Scripts that serve many languages are named as such ("Cyrillic script"); "other Latin" is Latin script with too few
    function words of English, German, French, Spanish, Italian, Portuguese, Dutch or Polish; "no words" holds no letter.
    """
    text = text[:LANGUAGE_CHARS]
    if _is_code(text):
        return "code"
    scripts: Counter[str] = Counter()
    for char, count in Counter(text).items():
        if char.isalpha():
            scripts[_BLOCKS[bisect_right(_STARTS, ord(char)) - 1][1]] += count
    if not scripts:
        return "no words"
    # Japanese is written in Kana and Han; Chinese in Han alone.
    if scripts["Kana"] * 10 > scripts["Han"]:
        scripts["Kana"] += scripts.pop("Han", 0)
    script = scripts.most_common(1)[0][0]
    if script == "Latin":
        return _latin_language(text)
    return {"Kana": "Japanese", "Han": "Chinese", "-": "another script"}.get(script, script)


def _latin_language(text: str) -> str:
    words = re.findall(r"[^\W\d_]+", text.lower())
    hits = {name: sum(map(common.__contains__, words)) for name, common in _FUNCTION_WORDS.items()}
    first, second = sorted(hits, key=lambda name: hits[name], reverse=True)[:2]
    if hits[first] == hits[second] or hits[first] < _FUNCTION_WORDS_LEAST * len(words):
        return "other Latin"
    return first


def _is_code(text: str) -> bool:
    code = total = 0
    fenced = False
    for line in text.splitlines():
        total += len(line)
        if line.startswith("```"):
            fenced = not fenced
            code += len(line)
        elif fenced or _CODE_LINE.match(line):
            code += len(line)
    return 2 * code > total
