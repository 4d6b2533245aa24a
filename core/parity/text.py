"""The text that is fed when none is given: prose, numbers, code, several scripts and signs outside the basic plane."""

from __future__ import annotations

__all__ = ["TEXT"]

TEXT = """\
A mortice is a hole cut into timber to take a tenon. The joint holds because both halves were measured against the same
line, not because either was forced. Carpenters in Kyōto (京都の大工) raised temple roofs this way without a nail; the
oldest of them have stood for 1,300 years, through some 40 large earthquakes.

Three rules are told to every apprentice:
  1. Mark from one edge only, and never from two.
  2. Saw beside the line (0.5 mm is plenty), then pare down to it.
  3. If it will not go together dry, glue will not help. 🪚🪵

« Mesure deux fois, coupe une fois », disait mon grand-père; моя бабушка говорила почти то же самое: «Семь раз отмерь,
один раз отрежь». In Athen heißt es: «Το καλό πράγμα αργεί να γίνει». وفي القاهرة يقولون: العجلة من الشيطان. हिन्दी में भी
ऐसी कहावत है। 한국에도 있다.

def fits(tenon: float, mortice: float, slack: float = 0.1) -> bool:
    return 0 <= mortice - tenon <= slack   # millimetres

>>> [fits(12.0, width) for width in (11.9, 12.0, 12.05, 12.3)]
[False, True, True, False]

The oak for the new gate came to 248.75 € per m³, delivered on Tuesday; the invoice said "payable within 30 days". We
planed it, left it for a week, and planed it again. What had looked straight on Monday had a twist in it by Friday, as
everybody but the two of us had expected. 😅👩🏽‍🔧
"""
