"""Scores that authors publish with their reward models, and where the numbers were seen.

``seen`` False: quoted from memory or at third hand, not found in print while this file was written. If such a number
does not come out, look at the card before the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

APPLES = (
    "Jane has 12 apples. She gives 4 apples to her friend Mark, then buys 1 more apple, and finally splits all her "
    "apples equally among herself and her 2 siblings. How many apples does each person get?"
)
THREE_APPLES = (
    "1. Jane starts with 12 apples and gives 4 to her friend Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among herself and her 2 siblings (3 people in total). 9 ÷ 3 = 3 apples each. "
    "Each person gets 3 apples."
)
FOUR_APPLES = (
    "1. Jane starts with 12 apples and gives 4 to her friend Mark. 12 - 4 = 8. Jane now has 8 apples.\n"
    "2. Jane buys 1 more apple. 8 + 1 = 9. Jane now has 9 apples.\n"
    "3. Jane splits the 9 apples equally among her 2 siblings (2 people in total). 9 ÷ 2 = 4.5 apples each. "
    "Each person gets 4 apples."
)
SURAL = "Sural relates to which part of the body?"
SURAL_REGION = (
    "The sural region is the muscular swelling of the back of the leg below the knee, formed chiefly by the bellies of "
    "the gastrocnemius and soleus muscles [1,2]."
)
SURAL_NERVE = (
    "The Sural nerve runs down the side of the leg near the small saphenous vein, then passes forward below the "
    "lateral malleolus and continues on the outside of the foot as the lateral dorsal cutaneous nerve, which then "
    "communicates with the intermediate dorsal cutaneous nerve, which branches off to the side of the foot. [1]"
)
FLAMINGOS = (
    "Sue lives in a fun neighborhood.  One weekend, the neighbors decided to play a prank on Sue.  On Friday morning, "
    "the neighbors placed 18 pink plastic flamingos out on Sue's front yard.  On Saturday morning, the neighbors took "
    "back one third of the flamingos, painted them white, and put these newly painted white flamingos back out on "
    "Sue's front yard.  Then, on Sunday morning, they added another 18 pink plastic flamingos to the collection. At "
    "noon on Sunday, how many more pink plastic flamingos were out than white plastic flamingos?"
)
FLAMINGO_STEPS = (
    "To find out how many more pink plastic flamingos were out than white plastic flamingos at noon on Sunday, we can "
    "break down the problem into steps. First, on Friday, the neighbors start with 18 pink plastic flamingos.",
    "On Saturday, they take back one third of the flamingos. Since there were 18 flamingos, (1/3 \\times 18 = 6) "
    "flamingos are taken back. So, they have (18 - 6 = 12) flamingos left in their possession. Then, they paint these "
    "6 flamingos white and put them back out on Sue's front yard. Now, Sue has the original 12 pink flamingos plus the "
    "6 new white ones. Thus, by the end of Saturday, Sue has (12 + 6 = 18) pink flamingos and 6 white flamingos.",
    "On Sunday, the neighbors add another 18 pink plastic flamingos to Sue's front yard. By the end of Sunday morning, "
    "Sue has (18 + 18 = 36) pink flamingos and still 6 white flamingos.",
    "To find the difference, subtract the number of white flamingos from the number of pink flamingos: (36 - 6 = 30). "
    "Therefore, at noon on Sunday, there were 30 more pink plastic flamingos out than white plastic flamingos. The "
    "answer is (\\boxed{30}).",
)
SIGMOID = "What is the range of the numeric output of a sigmoid node in a neural network?"


@dataclass(frozen=True)
class Published:
    """One checkpoint's example."""

    checkpoint: str
    prompt: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    """One for each answer; with ``differences`` the first answer's minus the second's."""
    where: str
    seen: bool = True
    differences: bool = False
    within: float = 0.25
    """Kernels and bfloat16 move scores about this much."""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.checkpoint.rpartition("/")[2] + "".join(f"-{value}" for value in self.options.values())[:12]


PUBLISHED = (
    Published(
        "Skywork/Skywork-Reward-V2-Llama-3.1-8B",
        APPLES,
        (THREE_APPLES, FOUR_APPLES),
        (23.0, 3.59375),
        "README of SkyworkAI/Skywork-Reward-V2 (SGLang there: 23.125, 3.578125)",
    ),
    Published(
        "Skywork/Skywork-Reward-Llama-3.1-8B-v0.2",
        APPLES,
        (THREE_APPLES.replace("her friend Mark", "Mark"), FOUR_APPLES.replace("her friend Mark", "Mark")),
        (13.6875, -9.1875),
        "README of SkyworkAI/Skywork-Reward; it gives v0.1 the same numbers, so one of the two may be out of date",
    ),
    Published(
        "LxzGordon/URM-LLaMa-3.1-8B",
        SIGMOID,
        (
            "The output of a sigmoid node is bounded between -1 and 1.",
            "The output of a sigmoid node is bounded between 0 and 1.",
        ),
        (2.3285412788391113, 12.438033103942871),
        "model card; its code tokenises a rendered template once more, so these were made with two BOS",
        within=1.0,
    ),
    Published(
        "LxzGordon/URM-LLaMa-3-8B",
        "when were the first Olympic Games held?",
        ("April 1896",),
        (3.669522523880005,),
        "model card; made with two BOS, as URM 3.1",
        within=0.5,
    ),
    Published(
        "openbmb/UltraRM-13b",
        SURAL,
        (SURAL_REGION, SURAL_NERVE),
        (0.1896953582763672,),
        "model card, in float32, with one line break before 'Assistant:' where its template has two",
        differences=True,
        within=0.02,
        options={
            "reward_dtype": "float32",
            "reward_template": "Human: {{ messages[0]['content'] }}\nAssistant: {{ messages[1]['content'] }}",
        },
    ),
    Published(
        "openbmb/Eurus-RM-7b",
        SURAL,
        (SURAL_REGION, SURAL_NERVE),
        (47.4404296875,),
        "model card, with the slash of [/INST] the wrong way round",
        differences=True,
        within=1.0,
        options={"reward_template": "[INST] {{ messages[0]['content'] }} [\\INST] {{ messages[1]['content'] }}"},
    ),
    Published(
        "nvidia/Llama-3.1-Nemotron-70B-Reward-HF",
        "What is 1+1?",
        ("1+1=2",),
        (-3.28125,),
        "vllm#8967, quoting the card",
        seen=False,
    ),
    Published(
        "infly/INF-ORM-Llama3.1-70B", APPLES, (THREE_APPLES, FOUR_APPLES), (4.96875, 2.890625), "model card", seen=False
    ),
    Published(
        "internlm/internlm2-7b-reward",
        "Hello! What's your name?",
        ("My name is InternLM2! A helpful AI assistant. What can I do for you?", "I have no idea."),
        (0.767578125, -2.22265625),
        "model card",
        seen=False,
        options={"trust_remote_code": True},  # for its tokenizer
    ),
    *(
        Published(
            "Qwen/Qwen2.5-Math-PRM-7B",
            FLAMINGOS,
            ("\n\n".join(FLAMINGO_STEPS),),
            (score,),
            "model card: [1.0, 0.1904296875, 0.9765625, 1.0]; others report 0.154 for the second step on other kernels",
            within=0.05,
            options={"prm_reduce": reduce},
        )
        for reduce, score in (("min", 0.1904296875), ("last", 1.0), ("mean", 0.791748046875))
    ),
)
