"""Verdicts by kind: inputs from the field, wrong answers near the gold, right ones in disguise."""

import json
import re
from pathlib import Path

import pytest

import verifier
from experiments import judging

CASES = [json.loads(line) for line in (Path(__file__).parent / "verifier_cases.jsonl").open()]
# the row was cut off, which its text alone does not show: `score` refuses it by `finished`
DEVIATIONS = {r"maybe \boxed{12}? No, wait, that can not be, since": True}


@pytest.mark.parametrize("kind", sorted({case["kind"] for case in CASES}))
def test_inputs_from_the_field(kind):
    for case in CASES:
        if case["kind"] == kind:
            verdict, reason = verifier.judge(case["response"], case["gold"], case["choices"])
            right = DEVIATIONS.get(case["response"], case["right"])
            assert verdict is right, f"{case['response']} for {case['gold']}: {reason}"


def words(text: str) -> list[str]:
    return [word.replace("␣", " ") for word in text.split(" ")]


def rows(table: str) -> list[tuple[str, str]]:
    """The first word of each line with each other one."""
    lines = map(words, table.strip().splitlines())
    return [(gold, answer) for gold, *answers in lines for answer in answers]


def judged(pairs: list[tuple[str, str]], right: bool) -> list[str]:
    """The pairs (gold, answer) that are not judged so."""
    verdicts = [(pair, *verifier.judge(rf"\boxed{{{pair[1]}}}", pair[0])) for pair in pairs]
    return [f"{answer} for {gold}: {why}" for (gold, answer), v, why in verdicts if v is not right]


NEAR = r"""
17 71 -17 1.7 17.1 16.9999999 17! 17^2 1/17 17x 17i 17_8 17\% 017.01 1e17 (1,7) 17:1 17th
-4 4 --4 -40 -0.4 1/-4 -4x 4- |-4| -4! (-4)^2 \{-4,4\} \pm4 -4\% 4i -4.0001
0.0625 0.625 0.00625 0.062 0.0626 .625 0,0625 1/61 0.0625\% 62.5\% -0.0625 0.0625x
31,400 400,31 400,␣31 (400,31)
31,400 31,4 31.400 3,1400 31,400.5 31,401 31400000 3.14 3.14\times10^{5} 31,400\% 314,00
\frac{3}{7} \frac{7}{3} \frac{3}{-7} 0.428571 0.43 3:7 (3,7) \frac{3}{70} 3\frac{1}{7} 3/7i
6.02\times10^{23} 6.02\times10^{22} 6.02\times10^{-23} 6.02^{23} 6.02e22 6.2\times10^{23}
-2.5\% 2.5\% -2.5 -0.25 -25\% 0.025 -2.5\text{ percentage points} -2.05\%
1.6\times10^{-19} 1.6\times10^{-18} -1.6\times10^{-19} 1.7\times10^{-19} 0 10^{-19} 1.6
\sqrt{2} 1.41421356237 \sqrt{3} -\sqrt{2} \sqrt{20} \sqrt[3]{2} 2 \sqrt{2}i 2^{-1/2} \pm\sqrt{2}
\pi 3.14159265358979 \frac{22}{7} 2\pi \pi^2 p \pi\ i -\pi 180^\circ 3.14
3\times10^{-30}x 4\times10^{-30}x 3\times10^{-31}x -3\times10^{-30}x 0 x
\left(\frac{2}{3}\right)^{70} \left(\frac{2}{3}\right)^{71} \left(\frac{3}{2}\right)^{70} 0
\frac{1}{81!} \frac{1}{83!} \frac{1}{80!} 0 \frac{2}{81!} -\frac{1}{81!}
2x^2-3x+1 2x^2+3x+1 2x^3-3x+1 2x^2-3x-1 3x^2-2x+1 2x-3x+1 (2x-1)(x+1) 2y^2-3y+1 2x^2-3x
x\geq5 x\leq5 x>5 x=5 x<5 y\geq5 x\geq-5 5\geq\ x x\neq5 5
(2,-7) (-7,2) (2,7) [2,-7] \{2,-7\} 2,7 -7,2 (2,-7,0) (-2,-7) (2,-7] 2-7 (2.7) -5
\{3,11\} x=3,y=11 (3,11) [3,11] \{3\} \{3,12\} \{3,11,0\} 3 11 311 3-11 \{3,1,1\} \{-3,11\}
[4,9) (4,9) [4,9] (4,9] [9,4) [4,90) [4,-9) \{4,9\} 4,9 4\leq\ x\leq9
5:8 8:5 5/8 0.625 5:8:1 5 13 5:80 10:18
x=6 y=6 x=-6 6=7 x=7=6 x=6=7 2x=6 x>6 x^2=6 x\neq6 \sqrt{x}=6
CD CCD C,D,D C D DC2 C,E CDE AC cd c,d C-D.
E F (F) D:E E,F EF E\text{ or }F 5 F:E EE2
①③ ①② ③ 13 1,3 ①②③ ①③④
on no On! o n ON? noon in of o no,on
Co CO co cO oC C O Co2 Cobalt
north south nort North-east thorn northern n
12\text{␣kg} 12\text{\ g} 12\text{\ lb} 12\text{\ kg}^2 12\text{\ km} 12^\circ 12\text{\ kg/s}
12\text{␣kg} 12\text{million} 12万
5 ln␣x=5 log␣x=5 sqrt␣x=5 not␣x=5 half␣of␣x=5 twice␣x=5 minus␣x=5 x^{-1}=5
5 5␣halves 5␣quarters 5␣percents 5␣lakhs 5␣crores 5成 5折 5打 5的平方 5次方 5的相反数 5错
10:00␣am 10:00␣pm 10:30␣am
3M␣+␣1 3m␣+␣1
\sin␣A \sin␣a
R_1 r_1
\angle␣ABC \angle␣ACB ∠CAB
\triangle␣ABC \triangle␣ACB
41 \phantom{41}
v=18␣m/s 18␣km/h v=18␣km/h 18\text{␣km/h} v=18␣s
3\times10^8␣m/s 3\times10^8␣km/s 3\times10^8␣m
t=3␣s 3␣min t=3␣min 3\text{␣h}
3\text{␣cm},4\text{␣m} 4␣cm,3␣cm 3,4␣cm 3␣m,4␣cm
"""  # a gold, and wrong answers near it; ␣ is a space
UNITS = ("cm", "m", "kg", "s", "N", "J", "Pa", "Hz", "V", "mol", "L", "cm^2", "m^3", "m/s", "m/s^2")
BROKEN = r"""
8␣\left(␣{n} \frac{{{n}}}{{ {n}{{ ({n} {n}) [{n} {n}^ {n}_ ^{n} {n}␣+ {n}␣- {n}␣\cdot \times␣{n}
=␣{n} {n}␣= {n}/ /{n} {n}␣\frac \foo␣{n} \neg␣{n} {n}␣8 {n}␣&␣8 {n}␣\\␣8 {n}.. {n}... {n}\ldots
{n}.5.6 {n}' {n}? #{n} @{n} \int␣{n} \log␣{n} \overline{{{n}}} \vec{{{n}}} f({n}) not␣{n}
{n}␣or␣8 {n}␣is␣wrong at␣least␣{n} more␣than␣{n} {n}␣thousand {n}␣dozen {n}亿 {n}倍 {n}以上
{n}-{n} 1{n}-8 {n}-01-05 {n}分之一 {n}␣below␣zero minus␣{n} {n},␣{n},␣{n} {n}!! {n}␣mod␣5
"""


def wrong_answers() -> list[tuple[str, str]]:
    pairs = rows(NEAR)
    for n, gold in enumerate(UNITS, 13):
        pairs += [(rf"{n}\text{{ {gold}}}", rf"{n}\text{{ {u}}}") for u in UNITS if u != gold]
    return pairs + [
        (n, form.format(n=n)) for n in ("7", "46") for form in words(" ".join(BROKEN.split()))
    ]


def test_no_wrong_answer_is_paid():
    pairs = wrong_answers()
    assert len(pairs) >= 500
    paid = judged(pairs, right=False)
    assert not paid, "\n".join(paid)


WRAPPED = r"""
{} ${}$ \({}\) \[{}\] ␣{}␣ {}. {}; {}。 **{}** "{}" “{}” `{}` {{{}}} \mathbf{{{}}}
\boldsymbol{{{}}} \textcolor{{red}}{{{}}} \color{{red}}{{{}}} \underline{{{}}} \displaystyle␣{}
\text{{{}}} \left({}\right) Answer:␣{} The␣answer␣is␣{} 答案：{} 答案是{}
The␣final␣answer␣is:␣{}. La␣respuesta␣es␣{} Die␣Antwort␣ist␣{} La␣réponse␣est␣{} ####␣{} x␣=␣{}
{}␣=␣x \therefore␣{} \fbox{{{}}}
"""
SAME = r"""
31400 31,400 31{,}400 31␣400 31\,400 31~400 31400.0 3.14\times10^4 3.14e4 3.14E+4 \$31,400
31400 ３１４００
0.375 \frac{3}{8} 3/8 \dfrac38 .375 37.5\% 0.3750 3.75\times10^{-1} 375e-3 ⅜ \frac{6}{16}
-5 –5 −5 －5 ‐5 ‑5 -5.0 -\frac{10}{2} \frac{-10}{2} \frac{10}{-2}
7/2 3½ 3\frac{1}{2} 3␣1/2 3.5 3\frac12 \frac{7}{2}
60^\circ 60° 60º 60˚ 60 60^{\circ} 60␣degrees 60\text{␣degrees} 60度
2\sqrt{3} 2√3 \sqrt{12} 2\cdot\sqrt3 \sqrt{3}\cdot2 \frac{6}{\sqrt{3}} √12 2√(3) 2\sqrt(3)
\omega+\phi ω+φ
\lambda\tau λτ
A\cap␣B A∩B
\emptyset ∅
x^2-y^2 x²-y² (x+y)(x-y) -y^2+x^2 x^{2}-y^{2} (x-y)(y+x)
(3,4) \langle3,4\rangle （3，4） (3;4) (3.0,4) x=3,y=4 y=4,x=3 3,4 (x,y)=(3,4)
\{2,9\} \{9,2\} 9,2 2、9 2␣and␣9 2␣or␣9 \lbrace2,9\rbrace x=9␣or␣x=2 2和9 \{2.0,9\}
[1,\infty) x\in[1,\infty) [1,∞) \left[1,\infty\right) [1,+\infty)
x\geq5 x≥5 x>=5 x\ge5 5\leq␣x x⩾5 5⩽x x\geqslant5 5≤x
2:3 2∶3 2：3 2␣:␣3 2:3.0
C c (C) C. C) [C] C:␣14 C␣-␣14 (C)␣14 选C 故选：C 答案C 选项C option␣C Choice␣C \textbf{C.␣14}
C C、14 C．14 C␣(14) \textbf{C}.␣14 \textbf{C}:␣14 选择C So␣C
A,C,D ACD C,A,D A;C;D A、C、D A,␣C␣and␣D DCA (A)(C)(D) A和C和D A␣C␣D
A,C,D \{A,C,D\} Options␣A,␣C␣and␣D The␣answers␣are␣A,C,D
②④ ②、④ ④② ②,④ ②和④
no No NO \text{no} no. **No**
north␣east North␣East NORTH␣EAST \text{north␣east}
18 18␣N 18␣V 18␣Hz 18␣kPa 18␣m/s 18\,\Omega 18°C 18␣rad 18\text{␣km/h} 18␣inches 18厘米 18平方米
18 ₹18 18␣dB 18␣lx 18␣m␣s^{-1}
18 18元 £18 ¥18 €18 18␣J 18␣mol 18\text{␣students} 18␣cm² 18㎡ 18千克 18␣square␣units 18␣kg·m/s
18 18␣dollars 18个 18米/秒
18␣m/s 18␣meters␣per␣second 18米/秒 18\text{␣m/s} 18\,\mathrm{m/s} 18
v=18␣m/s 18␣m/s 18 v=18\text{␣m/s} v=18 18米/秒
3\text{␣cm},4\text{␣m} 4\text{␣m},3\text{␣cm} 4␣m,3␣cm
3\times10^8 3\times10^8␣m/s 3\times10^{8}␣N 3e8␣J
1.5\times10^3␣N 1500␣N 1500
18␣m 18m 18\text{m}
18m 18␣m 18~m
x=18m 18␣m
\{1,2\} x_1=1,x_2=2 2,1
18␣cm^2 18␣square␣centimeters 18平方厘米 18␣cm² 18\text{␣cm}^2 18㎠ 18␣sq␣cm
5\sqrt{3} 5\sqrt{3}\text{␣cm} 5\sqrt{3}~\mathrm{m} 5√3 5\sqrt3␣cm
1.6e-19 1.6\times10^{-19} 1.60×10⁻¹⁹ \frac{16}{10^{20}} 16\cdot10^{-20} 1.6*10^{-19}
0.10000000149011612 0.1
0.30000000000000004 0.3
65.12000274658203 65.12
"""  # a gold, and right answers


def right_answers() -> list[tuple[str, str]]:
    pairs, forms = rows(SAME), words(" ".join(WRAPPED.split()))
    for gold in (
        "41",
        "-3",
        "0.25",
        "1,250",
        r"\frac{5}{9}",
        r"\sqrt{7}",
        "2y+1",
        r"3\pi",
        r"\frac{a}{2}",
    ):
        pairs += [(gold, form.format(gold)) for form in forms]
        pairs += [(form.format(gold), gold) for form in forms[:20]]
    return pairs


def test_right_answers_are_right_in_any_writing():
    pairs = right_answers()
    assert len(pairs) >= 500
    refused = judged(pairs, right=True)
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("\frac{3}{7}", "control characters"),
        ("\boxed{9}", "control characters"),
        ("\theta", "control characters"),
        ("\neq 3", "control characters"),
        ("\rho", "control characters"),
        ("\x0b", "control characters"),
        ("It would take 180 days", "a sentence"),
        ("There are many ways to see that this is so", "a sentence"),
        ("inf", "empty, infinite"),
        ("-Infinity", "empty, infinite"),
        ("nan", "empty, infinite"),
        (" $ $ ", "empty, infinite"),
        ("9" * 1001, "over 1000 characters"),
        ("Therefore, the answer is: 180.", None),
        ("x is equal to 3", None),
        ("#### 41", None),
        ("12\n", None),
        (r"\frac{3}{7}", None),
        (r"\theta", None),
        ("12 square meters", None),
        ("red\nblue", None),
        (r"\infty", None),
        ("1e400", None),
        ("an isosceles triangle", None),
    ],
)
def test_golds_that_nothing_can_equal(gold, reason):
    found = verifier.unanswerable(gold)
    assert found is None if reason is None else re.match(reason, found)


def test_the_speed_is_measured_of_right_and_wrong_answers(monkeypatch):
    verdicts = [verifier.is_correct(*answer) for answer in judging.ordinary(16)]
    assert verdicts == [n not in (0, 6, 8) for n in range(16)]  # the second root is of 3
    monkeypatch.setattr(judging, "PROMPTS", 1)
    assert judging.rate(8) > 0 and judging.hostile_step(judging.HOSTILE[:1], 11) > 0
