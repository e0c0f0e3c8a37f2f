"""Answers in other forms than the gold answer's: the same value is right, a near one is not."""

import pytest

from opsd.eval import math_verify_process
from opsd.eval.answer_text import to_latex
from opsd.eval.grading import grade


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """On a busy machine an answer that is right may come late."""
    monkeypatch.setattr(math_verify_process, "TIMEOUT_SECONDS", 300.0)
    monkeypatch.setattr(math_verify_process, "_START_SECONDS", 600.0)


# Answer | gold.
RIGHT = r"""
5\text{ million} | 5000000
2.5 million | 2500000
3\text{ million} | 3\times 10^6
12\text{ inches} | 12\text{ in}
12\text{ sq in} | 12\text{ in}^2
12\text{ cm}^2 | 12\text{ square centimeters}
12\text{ cm$^2$} | 12\text{ cm}^2
12\text{ cm}^2 | 12
60 \text{ miles per hour} | 60 \text{ mi/h}
17\text{ min} | 17\text{ minutes}
12\text{ apples} | 12\text{ fruits}
0.00000001 | 1 \times 10^{-8}
1/2^{98} | \frac{1}{2^{98}}
2^{-98} | 1/2^{98}
1 1/2 | 1.5
1 1/2 | \frac{3}{2}
1\frac{1}{2} | 1.5
1½ | 1.5
-1 1/2 | -1.5
-2½ | -2.5
-2\frac{1}{2} | -2.5
2\ 3/4 | 2.75
\sin(90^\circ-x) | \cos x
\cos x | \sin(90^\circ-x)
\sin(90°-x) | \cos x
sin(90° − x) | \cos x
\sin\left(90^{\circ}-x\right) | \cos x
\sin 30^\circ | \frac{1}{2}
\frac{1}{2} | \sin 30^\circ
\tan 45^\circ | 1
\cos(60°) | 0.5
\sin^2 45^\circ | 1/2
\cos(180^\circ - x) | -\cos x
\frac{\pi}{3} | 60^\circ
60^\circ | \frac{\pi}{3}
60^\circ | 60
60° | 60
60 | 60^\circ
60\degree | 60
√2 | \sqrt{2}
√2 | \sqrt2
\sqrt{2} | √2
2√3 | 2\sqrt{3}
√(x+1) | \sqrt{x+1}
√2/2 | \frac{\sqrt{2}}{2}
√2/2 | \frac{1}{\sqrt{2}}
(1+√5)/2 | \frac{1+\sqrt{5}}{2}
∛2 | \sqrt[3]{2}
½ | 0.5
½ | \frac{1}{2}
1/2 | ½
⅓ | \frac13
¾ | 0.75
x² | x^2
x²+1 | x^2+1
10⁻³ | 0.001
−5 | -5
2π | 2\pi
π/2 | \frac{\pi}{2}
(−∞, 3) | (-\infty,3)
(-∞,3] | (-\infty,3]
∞ | \infty
x<3 | (-\infty,3)
(-\infty,3) | x<3
x \le 3 | (-\infty,3]
x≤3 | (-\infty,3]
x \geq 3 | [3,\infty)
3 > x | (-\infty,3)
-1 < x \le 2 | (-1,2]
-1 \le x \le 2 | [-1,2]
[-1,2] | -1 \le x \le 2
2 \ge x > -1 | (-1,2]
x > 3 \text{ or } x < 1 | (-\infty,1)\cup(3,\infty)
x<1 or x>3 | (-\infty,1)\cup(3,\infty)
x \neq 3 | (-\infty,3)\cup(3,\infty)
\{x \mid x<3\} | (-\infty,3)
x \in (-\infty,3) | x<3
x<3 | x \in (-\infty,3)
x<\frac{1}{2} | (-\infty,\frac12)
x \ge 2 \text{ and } x < 5 | [2,5)
x < √2 | (-\infty,\sqrt{2})
0 < \theta < \pi | (0,\pi)
1<x<2 | 2>x>1
x<3 | 3>x
0.\overline{3} | \frac{1}{3}
\frac13 | 0.\overline{3}
0.\overline{3} | 1/3
0.\overline{142857} | \frac{1}{7}
0.1\overline{6} | \frac16
0.333... | \frac13
0.333\ldots | \frac13
0.333… | 1/3
0.(3) | 1/3
0.\dot{3} | 1/3
0.\overline{9} | 1
1.\overline{3} | \frac43
-0.\overline{3} | -\frac13
0.\overline{3} | 0.\overline{33}
0.\bar{3} | 1/3
33.\overline{3}\% | \frac{100}{3}\%
12.3\overline{45} | \frac{679}{55}
0.333333 | \frac{1}{3}
0.166667 | \frac16
0.0833333333333333 | \frac{1}{12}
\{0.\overline{3}, 1\} | \{1, \frac13\}
(½, 2) | (\frac12, 2)
1.5 \times 10^{-9} | 0.0000000015
(√2, √3) | (\sqrt2,\sqrt3)
5x² - 3 | 5x^2-3
α+1 | \alpha+1
１２ | 12
12 | １２
3·10⁸ | 3\times 10^8
½x | \frac{x}{2}
6.02×10^{23} | 6.02\times10^{23}
50% | 50\%
±√2 | \pm\sqrt{2}
0.12\overline{3} | \frac{37}{300}
x ≥ -2 | [-2, \infty)
\left[-2, \infty\right) | x \geqslant -2
x>0 | (0, +\infty)
1e-8 | 0.00000001
1.5e-7 | 0.00000015
2E5 | 200000
(-∞,3) U (5,∞) | (-\infty,3)\cup(5,\infty)
\sin(x+90^\circ) | \cos x
\cos(90^\circ-\theta) | \sin\theta
\sin(\frac{\pi}{2}-x) | \cos x
\arctan(1) | 45^\circ
180^\circ | \pi
\frac{√3}{2} | \sin 60^\circ
sqrt(2) | \sqrt{2}
√ 2 | \sqrt{2}
2√2+√3 | 2\sqrt{2}+\sqrt{3}
pi/2 | \frac{\pi}{2}
x<=3 | (-\infty,3]
x>=3 | [3,\infty)
{x | x<3} | (-\infty,3)
\left\{ x \mid x < 3 \right\} | (-\infty,3)
\{x \in \mathbb{R} : x < 3\} | (-\infty,3)
-\infty < x < 3 | (-\infty,3)
0.\overline{09} | \frac{1}{11}
2.\overline{6} | \frac83
.\overline{3} | \frac13
0.333\dots | \frac13
0.333\cdots | \frac13
2⁻¹ | \frac12
x⁴y² | x^4y^2
(x+1)² | (x+1)^2
3½ | \frac72
½π | \frac{\pi}{2}
e² | e^2
2 1/2\% | 2.5\%
x = 1 1/2 | 1.5
(1 1/2, 2) | (\frac32, 2)
1 1/2, 2 | \frac32, 2
\frac{1}{3} \approx 0.333 | \frac13
x\in(-\infty,-1)\cup(1,\infty) | x<-1 or x>1
√(2)/2 | \frac{\sqrt2}{2}
x ∈ (−∞, 3) | (-\infty,3)
2≤x≤5 | [2,5]
−1≤x<5 | [-1,5)
\cos 60^{\circ} | \frac12
\tan(60°) | \sqrt3
-½ | -0.5
–½ | -\frac12
10^{-30} | \frac{1}{10^{30}}
0.1 + 0.2 | 0.3
\frac{1}{3} | 0.3333333333
1.0 | 1
3.0\times10^{8} | 300000000
3.14159265 | \pi
2.718281828 | e
0.142857 | \frac17
0.666667 | \frac23
0.6666666 | \frac23
1.41421356 | \sqrt2
0.0009765625 | \frac{1}{1024}
0.333333333\% | \frac{1}{3}\%
2.5\times10^{-7} | 0.00000025
0.30000000000000004 | 0.3
\frac{0.1}{3} | \frac{1}{30}
100.0 | 100
1.50 | 1.5
23_5 | 23_{5}
1\,000 | 1000
1000 | 1\,000
12\,345\,678 | 12345678
1\ 234.5 | 1234.5
1~000 | 1000
1 000 | 1000
-1 000 | -1000
\frac{1\,000}{3} | \frac{1000}{3}
1\,000\text{ m} | 1000
\$5 | 5\text{ dollars}
$5 | 5
\$5 | 5
5\text{ cents} | 5
\{1,2\} | 1,2
(1,2) | 1,2
\{2,1\} | \{1,2\}
\left(1,2\right) | (1,2)
\{(1,2),(3,4)\} | (1,2),(3,4)
\angle ABC | \angle CBA
\angle{ABC} | \angle ABC
\triangle ABC | \triangle CBA
\overline{AB} | \overline{BA}
xy | yx
"""
WRONG = r"""
5\text{ million} | 5
3\text{ thousand} | 3
2\text{ billion} | 2\text{ million}
10\text{ am} | 10\text{ pm}
12\text{ inches}^4 | 12\text{ inches}^2
12 \text{ cm}^3 | 12 \text{ cm}^2
12 cm³ | 12 cm^2
12 \mathrm{cm}^{3} | 12 \mathrm{cm}^{2}
12 cubic inches | 12 square inches
5 \text{ km} | 5 \text{ m}
5 km | 5\text{ mi}
5\text{ minutes} | 5\text{ hours}
60 \text{ m/s} | 60 \text{ km/h}
24\text{ units} | 24\text{ square units}
0.00000001 | 0.00000002
1/2^{98} | 1/2^{99}
\frac{1}{2^{98}} | \frac{1}{2^{99}}
10^{-9} | 2\cdot 10^{-9}
1e-20 | 2e-20
10^{-20} | 0
0.0000001 | 0
1+10^{-20} | 1
\{0.00000001, 1\} | \{0.00000002, 1\}
(10^{-9}, 1) | (10^{-10}, 1)
[10^{-9}, 1) | [10^{-10}, 1)
x/2^{98} | x/2^{99}
10^{-9}x | 2\cdot 10^{-9}x
0.00000001\% | 0.00000002\%
3 \times 10^{-10} | 4 \times 10^{-10}
1 1/2 | 1
1 1/2 | \frac{11}{2}
1 1/2 | \frac12
1 1/2 | 0.5
1½ | \frac12
-1 1/2 | -\frac12
-1 1/2 | -0.5
-2½ | -1.5
2\frac{1}{2} | 1
\sin(90^\circ-x) | \sin x
\sin(90^\circ-x) | -\cos x
\sin 30^\circ | \sin 30
\sin 30 | \frac{1}{2}
\sin 30^\circ | -0.988
\cos(90^\circ) | 1
60^\circ | 30
60 | \frac{\pi}{3}
60^\circ | 60\pi
√2 | 2
√2 | \sqrt{3}
√(x+1) | \sqrt{x}+1
√2/2 | \sqrt{1}
½ | \frac13
½ | 2
½ | 12
x² | x2
x² | 2x
10⁻³ | 1000
−5 | 5
(−∞, 3) | 3
(−∞, 3) | (-\infty, 3]
x<3 | (-\infty,3]
x<3 | (3,\infty)
x>3 | (-\infty,3)
x \le 3 | (-\infty,3)
x<3 | x \le 3
x<3 | x>3
x<3 | y<3
x<3 | 3
3 | x<3
-1 < x < 2 | [-1,2]
-1 < x \le 2 | (-1,2)
-1 < x \le 2 | [-1,2)
-1 < x < 2 | (-1,3)
1<x<2 | 1,2
1 < x > 2 | (1,2)
x<1 or x>3 | (1,3)
x<1 or x>3 | (-\infty,1)\cup[3,\infty)
x \neq 3 | (-\infty,\infty)
x \neq 3 | 3
x>1 \text{ and } x>3 | (1,3)
x>1 \text{ and } x<3 | (-\infty,1)\cup(3,\infty)
0.\overline{3} | 0.3
0.\overline{3} | 0.33
0.3 | 0.\overline{3}
0.333 | 0.\overline{3}
0.333 | \frac13
0.333... | 0.333
0.333\ldots | 0.333
0.6\ldots | 0.6
0.1\overline{6} | 0.\overline{16}
0.\overline{12} | 0.1\overline{2}
0.1(6) | 0.6
0.\overline{3} | \frac{3}{10}
0.\overline{9} | 0.9
3.14159 | \pi
3.14\ldots | 3.14
x² | x^3
1 2/3 | \frac{2}{3}
5 @ 7 | 7
1,2 | (1,2]
0.1234 | 0.1235
0.00001234 | 0.00001235
1.00001 | 1
0.9999 | 1
1e-8 | 2e-8
1e-8 | 1e-9
(-∞,3) U (5,∞) | (-\infty,3)\cup[5,\infty)
x^2<9 | (-3,3)
\sin(x-90^\circ) | \cos x
\cos(90^\circ-\theta) | \cos\theta
\arctan(1) | 45
90^\circ | \pi
√(2)/2 | \sqrt{1}
3½ | \frac32
10^{-30} | \frac{1}{10^{31}}
x<=3 | (-\infty,3)
0.\overline{09} | \frac{1}{10}
2.\overline{6} | 2.6
2 1/2\% | \frac12\%
{x | x<3} | (-\infty,3]
2≤x≤5 | (2,5)
2≤x≤5 | 2,5
2≤x≤5 | (2,5]
x>2 | [2,\infty)
x>2 or x<2 | (-\infty,\infty)
1.5e-7 | 1.6e-7
e-8 | 1e-8
2^{100} | 2^{100}+1
10^{30}+1 | 10^{30}
\frac{10^{20}+1}{10^{20}} | 1
(1+10^{-18})x | x
\sqrt{1+10^{-16}} | 1
0.99999999999999999999 | 1
1.0000001 | 1.0000002
1.0000001 | 1
1.0000001 | 1.00
0.3000001 | \frac{3}{10}
0.0000010 | 0.0000011
0.00000012345 | 0.00000012346
99999.9999999 | 100000
0.3333 | \frac13
1000000.0000001 | 1000000.0000002
(1.0000001, 2) | (1, 2)
\begin{pmatrix}10^{-9}&1\\0&1\end{pmatrix} | \begin{pmatrix}10^{-8}&1\\0&1\end{pmatrix}
x+10^{-9} | x+10^{-8}
x=0.00000001 | x=0.00000002
23_5 | 23_7
1011_2 | 1011_{3}
1\,000 | 1
3\,000 | 0
12\,34 | 1234
2\,300 | 600
\$5 | 5\text{ cents}
$5 | 5 cents
5\text{ cents} | \$5
5\text{ cents} | $5
\$5 | 6\text{ dollars}
\{1,2\} | (1,2)
(1,2) | \{1,2\}
\left\{1,2\right\} | [1,2]
(1,2,3) | \{1,2,3\}
\angle ABC | \angle BCA
\overline{AB} | \overline{AC}
"""


def pairs(rows):
    return [tuple(row.rsplit(" | ", 1)) for row in rows.strip().splitlines()]


@pytest.mark.parametrize(("answer", "gold"), pairs(RIGHT))
def test_the_same_value_in_another_form_is_right(answer, gold):
    assert grade(f"So it is \\boxed{{{answer}}}.", gold)


@pytest.mark.parametrize(("answer", "gold"), pairs(WRONG))
def test_another_value_is_wrong_however_near_it_is_or_looks(answer, gold):
    assert not grade(f"So it is \\boxed{{{answer}}}.", gold)


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        ("Answer: ½", "0.5", True),
        ("Answer: 1 1/2", "1.5", True),
        ("Answer: x < 3", "(-\\infty,3)", True),
        ("Answer: the interval $x<3$.", "(-\\infty,3)", True),
        ("Answer: 12 people", "12", True),
        ("The answer is ½.", "0.5", True),
        ("The answer is $0.\\overline{3}$", "1/3", True),
        ("The answer is (−∞, 3).", "(-\\infty,3)", True),
        # One number of several, or one in a formula, is not the answer.
        ("Answer: 1 1/2", "1", False),
        ("Answer: (−∞, 3)", "3", False),
        ("Answer: 3 or 5", "5", False),
        ("Answer: 5, 7", "7", False),
        ("Answer: x^2 + 3", "3", False),
        ("Answer: not 5", "5", False),
        ("The answer is (−∞, 3).", "3", False),
        ("The answer is √2.", "2", False),
        ("It is 0.00000001", "0.00000002", False),
        ("Answer: $5", "5", True),
        ("Answer: $5", "5 cents", False),
        ("Answer: 5 dollars", "5 cents", False),
        ("The answer is $1\\,000$.", "1000", True),
    ],
)
def test_answers_outside_of_boxes_are_read_alike(response, gold, right):
    assert grade(response, gold) is right


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("0.\\dot{1}4285\\dot{7}", "\\frac{1}{7}"),
        ("0.3\u0305", "\\frac{1}{3}"),
        ("0.\\overline{13}_4", "0.\\overline{13}_4"),  # in base 4 it is another number
        ("0.5(3)+1", "0.5(3)+1"),  # a product, it seems
        ("2.718281828...", "2.718281828"),  # 1828 twice is chance here
        ("3.1...", "3.1..."),
        ("1 3/2", "1 3/2"),
        ("2 000 1/2", "2 000 1/2"),
        ("2\\,000 + 1", "2000 + 1"),
        ("1,\\,200\\,300", "1,\\,200\\,300"),  # a list, it seems
        ("100/1\\,000", "100/1000"),
        ("1\\ 500/1000", "\\frac{3}{2}"),  # a mixed number
        ("x²√3", "x^{2}\\sqrt{3}"),
        ("³√8", "\\sqrt[3]{8}"),
        ("√√2", "\\sqrt{\\sqrt{2}}"),
        ("√", "√"),
        ("3–5", "3–5"),  # a range
        ("\\text{sin}", "\\text{sin}"),
        ("２", "2"),
    ],
)
def test_what_is_read_as_latex_and_what_is_left(text, latex):
    assert to_latex(text) == latex


@pytest.mark.e2e
@pytest.mark.parametrize("text", ["√(" * 4000, "²" * 8000, "x^\\circ " * 880])
def test_hostile_gold_answers_are_read_in_bounded_time(text):
    assert grade("\\boxed{\\pi}", text) is False
    assert grade(f"\\boxed{{{text[:1900]}}}", "\\pi") is False
