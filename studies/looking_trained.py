"""``looking`` at models that were trained three times: an X(2+1)D and a ViViT, each with 8 tokens, on set 1.

They are the folders that ``studies/ut_interaction/train.py`` writes to ``runs/ut-interaction``, so it has to be run
first (5 minutes a training on a core). A seed takes one of the ten sequences and one of the three trainings, so the
deviation is over both. Give all ten seeds, for the clips differ much.

Paper: claim 8 is shown by figures only.
"""

from __future__ import annotations

from tokenlearner.study.looking import NEW, STILL, study_of

FOLDERS = "runs/ut-interaction/{}-set1-seed{{seed}}"

STUDY = study_of(
    "What tokens look at, three trainings each",
    "Do the maps of models trained again lie on the people and follow them too?",
    {
        "video": ("X(2+1)D", FOLDERS.format("x2plus1d-tl8")),
        "vivit": ("ViViT", FOLDERS.format("vivit-tl8")),
    },
    {"still": STILL, "new": NEW},
)
