"""What tokens look at in UT-Interaction's clips: the maps of trained models, of untrained ones, and flat ones.

The trained models are those that come with the package: X(2+1)D, trained on set 1, and a ViT of CIFAR-10, which sees
the frames one by one and never saw a video. All look at clips of set 2. The score, lift, is a map's mass on what moves
over its share of the area (:mod:`tokenlearner.inspection.looking` defines it and the other measures): 1 for a flat map.
The camera stands still and people meet in the middle, so a map that never changes can lie on them too: "mean maps" are
each token's mean over all frames in place of its maps, and only what goes beyond them follows anything.

Each of the seeds 0 to 9 takes one of set 2's ten sequences, six clips each. So the deviation of a trained model, of
which there is one, is over sequences alone; that of a new TokenLearner and of an untrained model is over their first
weights too. Give all ten seeds, for the clips differ much. ``looking_trained`` has three trainings of two models.

Paper: claim 8 is shown by figures only.
"""

from __future__ import annotations

from tokenlearner.study.looking import NEW, STILL, UNTRAINED, study_of

STUDY = study_of(
    "What tokens look at: mass on what moves over its area",
    "Do the maps of trained models lie on the people, follow them, and differ from token to token?",
    {
        "video": ("X(2+1)D", "x2plus1d_micro_tokenlearner.ut_interaction"),
        "image": ("ViT of CIFAR-10", "tokenlearner_micro4_32_8at2_mlp.cifar10"),
    },
    {"still": STILL, "new": NEW, "untrained": UNTRAINED},
)
