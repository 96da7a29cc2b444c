"""How answers are written: one notation for gold and answer, exact numbers, units, lists, names.

Nothing here decides what is right: verifier.py does.
"""

import functools
import re
import struct
import unicodedata
from collections import Counter
from fractions import Fraction

# ---- One notation ---------------------------------------------------------------------

SIGNS = r"""
– -|— -|− -|‐ -|· \cdot |∙ \cdot |⋅ \cdot |× \times |÷ /|⁄ /|± \pm |√ \sqrt |∞ \infty |∶ :
⩽ \leq |⩾ \geq |∅ \emptyset |∩ \cap |∠ \angle |△ \triangle |≤ \leq |≥ \geq |≠ \neq |≈ \approx
∪ \cup |∈ \in |、 , |。 .|‘ '|’ '|′ '|“ "|” "|″ "|⟨ (|⟩ )|〈 (|〉 )
"""  # what NFKC leaves, and what it becomes
SIGNS = dict(pair.split(" ", 1) for pair in re.split("[|\n]", SIGNS.strip()))
for sign in "αβγδεζηθικλνξπρστυφχψω":  # μ is also a unit's prefix
    SIGNS[sign] = "\\" + unicodedata.name(sign).split()[-1].lower().replace("lamda", "lambda")
SIGNS = {sign: latex + " " * latex.startswith("\\") for sign, latex in SIGNS.items()}
FONT = r"\\(?:text\w*|math(?!bb|cal)\w+|mbox|boldsymbol|bm|emph|underline|boxed|fbox)\s*"
FONT = re.compile(FONT + r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
LATEX = {  # pattern: replacement, in this order
    r"\\\\(?=[A-Za-z])(?!.*matrix)": r"\\",  # a command whose backslash was doubled
    r"\\(?:left|right|[bB]ig+[lr]?|[lL]arge|[hH]uge|displaystyle|bf|rm|it|therefore)\b|\\!\s*": "",
    r"\\q?quad\b|\\[,;: ]|\\[()\[\]]|\\\\$": " ",
    r"\{,\}": ",",
    r"\\[dtc]frac": r"\\frac",
    r"\\frac\s*(\d)\s*(\d)": r"\\frac{\1}{\2}",
    r"\\sqrt\s*(\d+|[A-Za-z])": r"\\sqrt{\1}",
    r"\\sqrt\s*\(([^()]*)\)": r"\\sqrt{\1}",
    r"\^\s*\{?\s*\\circ\s*\}?|\\degree": "°",
    r"\\Omega\b": "Ω",
    r"\\mu\b\s*": "μ",
    r"\\%|\s*\b(?:percent(?:age)?|per cent|pct)\b": "%",
    r"\\lbrace": r"\\{",
    r"\\rbrace": r"\\}",
    r"\\langle": "(",
    r"\\rangle": ")",
    r"\\lt\b": "<",
    r"\\gt\b": ">",
    r"<=|\\leq?(?:slant)?\b": r"\\leq ",
    r">=|\\geq?(?:slant)?\b": r"\\geq ",
    r"!=|\\neq?\b": r"\\neq ",
    r"\s*\b(?:is equal to|equals)\b\s*|\s*等于\s*": "=",
    r"(?<![,~\s])[,~\s]*(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])[~\s]*|\s*[和或与及]\s*": ", ",
    r"\s+": " ",
    r" ?~[ ~]*": "~",
    r"~(?=[\^_])": "",
}
LATEX = [(re.compile(pattern), replacement) for pattern, replacement in LATEX.items()]
LEAD_IN = re.compile(
    r"\A(?:.*####|(?:so|thus|hence|therefore)\b[, ]+|∴|"
    r"(?:(?:so|thus|hence|therefore|i choose)\b[, ]*)?(?:(?:the|la|le|die|el)\s+)?"
    r"(?:(?:final|correct|right)\s+)?(?:answer|ans|option|choice|result|solution|respuesta|réponse|"
    r"antwort|opción)s?(?:\s+(?:is|are|es|est|ist|lautet)\b)?(?=[\s~:.=(])\s*[:.=]?"
    r"(?:[\s~]*(?:option|choice)(?=[\s~(]))?|"
    r"(?:故|所以|因此)?(?:正确)?(?:答案|选项|选择|应选|选|答)[是为选]?:?|"
    r"\w+\s*\\in(?=\W))[\s~]*(?=\S)",
    re.IGNORECASE | re.DOTALL,
)
OUTER = re.compile(r"([*_`'\"]{1,3})(?P<a>.+)\1|\{(?P<b>[^{}]*)\}|(?P<c>.*[^.])[.;:,]", re.DOTALL)


@functools.lru_cache(maxsize=1 << 14)
def normalise(text: str) -> str:
    """A gold or an answer in plain LaTeX: no fonts, no quotes, no "The answer is", ASCII for signs.

    Superscripts and fractions of one sign go first, for NFKC makes 52 of 5² and 31/2 of 3½; circled
    digits stay. A tilde remains where text was set upright: in 5~m a unit begins there.
    """
    nfkc = functools.partial(unicodedata.normalize, "NFKC")
    text = re.sub("[º˚]", "°", text)
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", lambda run: f"^{{{nfkc(run[0])}}}", text)
    text = re.sub("[₀-₉]+", lambda run: f"_{{{nfkc(run[0])}}}", text)
    halves = "[¼-¾⅐-⅞]"
    text = re.sub(halves, lambda sign: rf"\frac{{{nfkc(sign[0]).replace('⁄', '}{')}}}", text)
    text = re.sub("[^①-⑳]+", lambda run: nfkc(run[0]), text).translate(str.maketrans(SIGNS))
    text = re.sub(r"\\\$|^\s*\$(?=[\d.,]+$)", "¤", text).replace("$", " ").replace("¤", "$")
    text, count = re.sub(r"\\(?:text|f)?color(?:box)?\{[^{}]*\}", "", text), 1
    while count:
        text, count = FONT.subn(r"~\1~", text)
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    before = None
    while before != text:
        before, text = text, LEAD_IN.sub("", text.strip(" ~")).strip(" ~")
        if outer := OUTER.fullmatch(text):
            text = outer["a"] or outer["b"] or outer["c"] or ""
    return text


def bare(text: str) -> str:
    """The text without tildes; 5 m is 5m."""
    if " " not in text and "~" not in text:
        return text
    return re.sub(r"(?<=\d)[ ~]+(?=[^\W\d_])", "", text).replace("~", " ")


# ---- Numbers --------------------------------------------------------------------------

PLAIN = re.compile(r"(?=.*\d)(?:[1-9]\d{0,2}(?:[, ]\d{3})+|\d{1,400})?(?:\.\d{1,400})?")
POWER = re.compile(r"(.*?)(?:[eE]|(?:^| ?(?:\\times|\\cdot|\*|x)) ?10\^)\{?\(?([-+]?\d{1,4})\)?\}?")
FRACTION = re.compile(r"(?:(\d{1,9})(?: |(?=\\)))?(?:\\frac ?\{(.+)\} ?\{(.+)\}|([^/ ]+)/([^/ ]+))")


def number(text: str) -> Fraction | None:
    """The exact value of a decimal, times a power of ten, of their fraction, or of a percentage.

    Thousands may be set apart by commas or spaces, mixed numbers by a space, as in 3 1/2.
    """
    text = text.replace("~", " ").strip()
    if text[:1] in ("-", "+"):
        value = None if text[1:2] in ("-", "+") else number(text[1:])
        return -value if value and text[0] == "-" else value
    if text.endswith("%"):
        value = number(text[:-1])
        return value and value / 100
    if PLAIN.fullmatch(text):
        return Fraction(re.sub("[, ]", "", text))
    if (power := POWER.fullmatch(text)) and (not power[1] or PLAIN.fullmatch(power[1])):
        return Fraction(re.sub("[, ]", "", power[1]) or 1) * Fraction(10) ** int(power[2])
    if parts := FRACTION.fullmatch(text):
        over, under = (number(part) for part in parts.groups()[1:] if part)
        if over is not None and under and (not parts[1] or 0 < over < under):
            return int(parts[1] or 0) + over / under
    return None


def short(text: str) -> Fraction | None:
    """The decimal that a float's long text stands for: 0.1 of 0.10000000149011612, a float32."""
    if not re.fullmatch(r"-?\d{1,9}\.\d{9,}", text):
        return None
    value = float(text)
    single, short = struct.pack("f", value), f"{value:.6g}"
    if struct.unpack("f", single)[0] == value and struct.pack("f", float(short)) == single:
        return Fraction(short)
    short = f"{value:.15g}"  # 0.30000000000000004, a float64
    return Fraction(short) if len(short) < 14 and len(text) > 16 else None


# ---- Units ----------------------------------------------------------------------------

UNITS = """
mm 毫米 millimeter millimetre|cm 厘米 公分 centimeter centimetre|dm 分米|m 米 meter metre
km 千米 公里 kilometer kilometre|in inch inches|ft foot feet|yd yard|mile 英里|mg 毫克 milligram
g 克 gram gm|kg 千克 公斤 kilogram|t 吨 ton tonne|lb lbs pound|s 秒 sec second|min 分钟 分 minute
h 小时 时 hr hour|day 天 日|week 周|month 月 个月|year 年 岁 yr|mL ml 毫升|L l 升 liter litre
N 牛 牛顿 newton|J 焦耳 joule|W 瓦 瓦特 watt|V 伏 伏特 volt|A 安培 amp ampere|Ω 欧 欧姆 ohm
Hz 赫兹 hertz|Pa 帕 pascal|C 库仑 coulomb|K kelvin|am AM|pm PM|mol 摩尔 mole|rad 弧度 radian
° 度 deg degree|°C 摄氏度|°F|$ dollar usd 美元|¥ 元 yuan rmb|£|₹ rupee|€ euro 欧元|cent|mph
rpm|hectare ha 公顷|acre|gallon|unit 单位|person 人 名 people|child children
piece 个 只 件 张 块 条 本 支 辆 棵 台 头
way 种
"""
UNITS = {name: names.split()[0] for names in re.split("[|\n]", UNITS) for name in names.split()}
PREFIXED = re.compile(
    r"[pnμmckMG]?(?:[mgsNJWVAΩLTFCH]|Hz|Pa|mol|eV|Wb|Wh|bar|cal)|d[mLB]|atm|l[mx]"
)
NOUN = re.compile(
    "(?!.*(?:illion|thousand|hundred|dozen|half|halve|quarter|percent|lakh|crore|"
    "th|third|ten|les|plu|minu)s)[a-z]{3,}s"
)
COUNTED = re.compile("[^百千万亿兆十分之倍不或约多上下左右第余几半负点减加成折打的错]{1,4}(?<!方)")
POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3}
PART = re.compile(
    rf"(/|per[ ~]|每)?[ ~*]*(?:({'|'.join(POWERS)})(?![a-z])\.?)?[ ~]*(°[CF]?|[$£¥€₹]|[^\W\d_]+)\.?"
    r"(?:\^?\{?(-?\d)\}?(?!\d))?[\s~]*(?:\\cdot|\*)?[\s~]*"
)


def unit(text: str) -> dict[str, int] | None:
    """The powers that make up a unit, as in {"m": 1, "s": -2}; None if it is no unit."""
    powers, place = Counter(), 0
    while place < len(text):
        if not (part := PART.match(text, place)):
            return None
        over, power, name, exponent = part.groups()
        known = UNITS.get(name) or len(name) > 2 and UNITS.get(name.lower().removesuffix("s"))
        counted = NOUN.fullmatch(name) or name > "一" and COUNTED.fullmatch(name)
        if not known and not counted and not PREFIXED.fullmatch(name):
            return None
        powers[known or name] += int(exponent or POWERS.get(power, 1)) * (-1 if over else 1)
        place = part.end()
    return powers


def split_unit(text: str) -> tuple[str, dict[str, int] | None]:
    r"""("5", {"m": 1}) of "5 m" and of "5~m"; in 5m and "\pi m" the m may be any quantity."""
    if text[:1] and text[0] in "$£¥€₹" and number(text[1:]) is not None:
        return text[1:], unit(text[0])
    for gap in re.finditer(r"(?<=[\d)}!])[ ~]*(?=[^\W\d_]|[°$£¥€₹])|~(?=[A-Za-z])", text):
        value, rest = text[: gap.start()], text[gap.end() :]
        spaced = gap[0] and not re.search(r"/|\\frac", value) and number(value) is not None
        spaced = spaced and not re.match(r"(?!sq)[A-Za-z]{1,2} [A-Za-z](?!\^\{?-)", rest)  # 2 m g
        long = not re.match(r"(?!cm|km|mm|kg)[A-Za-z]{1,2}(?![a-z\d])", rest)
        if ("~" in gap[0] or spaced or long) and (found := unit(rest)):
            if len(pieces(value)) > 1 and number(value) is None:
                break  # 3 cm, 4 m: a unit of the last alone
            return value, found
    return text, None


# ---- Lists and names -------------------------------------------------------------------

NAME = re.compile(  # what may stand before "=": x, x_1, f(x), AB, \angle ABC, V_1:V_2, (x, y)
    r"(?!.*\b(?:ln|log|sqrt|sin|cos|tan|not|half|twice|minus|negative)\b)"
    r"(?=.*[A-Za-z])(?:[A-Za-z ~|:{}]|_\w|_\{[^{}]*\}|\^\{-1\}(?=\()|\([\w, ]*\)|"
    r"\\(?:angle|triangle|frac|overline|vec|Delta|alpha|beta|theta|lambda|phi|omega|rho)\b)+"
)


def pieces(text: str) -> list[str]:
    """What semicolons, or else commas, separate outside of brackets; [] if one does not close."""
    depth, cuts = 0, {",": [], ";": []}
    for token in re.finditer(r"\\?[{}]|[()\[\],;]", text):
        if token[0] not in cuts:
            depth += 1 if token[0][-1] in "{([" else -1
        elif depth == 0:
            cuts[token[0]].append(token.start())
        if depth < 0:
            return []
    cuts = [-1, *(cuts[";"] or cuts[","]), len(text)]
    found = [text[start + 1 : end].strip(" ~") for start, end in zip(cuts, cuts[1:])]
    return [] if depth else [piece for piece in found if piece]


def elements(text: str) -> tuple[str, list[str]]:
    r"""("()", ["3", "4"]) of "(3,4)"; without brackets, and of one element, the first is empty."""
    for opens, closes in (("(", ")"), (r"\{", r"\}"), ("[", "]"), ("[", ")"), ("(", "]")):
        inner = text[len(opens) : -len(closes)]
        if text.startswith(opens) and text.endswith(closes) and (found := pieces(inner)):
            return (opens + closes if len(found) > 1 else ""), found
    found = []
    for piece in pieces(text):
        twice = piece.count(r"\pm") == 1
        found += [piece.replace(r"\pm", sign) for sign in "+-"] if twice else [piece]
    return "", found


def named(text: str) -> tuple[str, str]:
    """("x", "3") of "x=3" and of "3=x"; the first is empty where nothing is named."""
    sides = re.split(r"=|\\approx", text)
    if len(sides) == 2 and NAME.fullmatch(sides[1]) and not NAME.fullmatch(sides[0]):
        sides.reverse()
    if len(sides) > 1 and NAME.fullmatch(sides[0]):
        return re.sub("[ ~]", "", sides[0]), "=".join(sides[1:]).strip(" ~")
    return "", text
