"""The text of the demo model: short stories for children, drawn from a grammar.

A story is an opening, the scenes of one plot, and an ending. Who it is about, what they own and
where they are is drawn once a story, so that a model has to look back to go on. In a template
``{field}`` is filled from that cast, ``{Field}`` the same with a capital, and ``[a|b]`` is one of
its alternatives.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple


class Story(NamedTuple):
    """A story, and what could be said before it."""

    opening: str
    """Who it is about; may be empty."""
    body: str
    """What happens."""
    request: str
    """Words in which somebody could have asked for it."""
    oddity: str
    """A sentence that makes little sense, in place of the opening."""

    @property
    def text(self) -> str:
        """The whole story."""
        return f"{self.opening} {self.body}".lstrip()


class Plot(NamedTuple):
    """What happens.

    ``topic`` names the plot in a request. One of ``props`` is drawn a story, and its fields join
    the cast; ``fkind`` is always among them, since the plot knows who can help.
    """

    topic: str
    props: tuple[dict[str, str], ...]
    scenes: tuple[str, ...]


_BOYS = ("Tim", "Ben", "Tom", "Max", "Sam", "Jack", "Leo", "Finn")
_GIRLS = ("Lily", "Mia", "Sue", "Anna", "Lucy", "Rosie", "Ella", "Nora")
_HE_ANIMALS = ("Pip", "Bruno", "Toby", "Ollie", "Rusty", "Milo", "Oscar", "Teddy")
_SHE_ANIMALS = ("Coco", "Daisy", "Poppy", "Luna", "Hazel", "Bella", "Ruby", "Willow")
_ANIMALS = (
    *("fox", "rabbit", "bear", "mouse", "frog", "duck", "squirrel", "hedgehog"),
    *("turtle", "cat", "dog", "pig", "goat", "dragon"),
)
_ANY_ANIMAL = "|".join((*_ANIMALS, "owl"))
_ANYBODY = _ANY_ANIMAL + "|boy|girl"
_TRAITS = ("kind", "brave", "happy", "curious", "clever", "gentle", "cheerful", "friendly")
_PLACES = (
    *("in the park", "in the forest", "in the garden", "in the meadow", "on the farm"),
    *("on the beach", "by the river", "near the lake", "on the hill", "in the village"),
)
_THINGS = {
    "color": ("red", "blue", "green", "yellow", "purple", "pink", "golden", "white"),
    "toy": ("ball", "kite", "hat", "drum", "boat", "bell", "ribbon", "button", "balloon"),
    "food": ("apple", "cookie", "pear", "cake", "pie", "bun", "carrot", "sandwich"),
}

_OPENINGS = (
    "Once upon a time, there was a [little|small|young] {kind} named {hero}.",
    "Once upon a time, there was a {trait} {kind} named {hero}, who lived {place}.",
    "Once upon a time, a {trait} little {kind} named {hero} lived in a [cozy|tiny] house {place}.",
    "Once upon a time, in a land far away, there lived a {trait} {kind} named {hero}.",
    "Long ago, there lived a {trait} {kind} whose name was {hero}.",
    "There once was a [little|small|young] {kind} named {hero}, who lived {place}.",
    "{hero} was a {trait} little {kind} who lived {place}.",
    "In a [cozy|tiny] house {place}, there lived a {trait} {kind} named {hero}.",
    "",  # straight into the plot, as a prompt may be
)
_ENDINGS = (
    "From that day on, {hero} and {friend} were the best of friends.",
    "And {hero} and {friend} lived happily ever after.",
    "That night, {hero} went to bed with a big smile.",
    "{hero} never forgot that day.",
    "{hero} and {friend} [laughed|sang|danced] until the stars came out.",
    "And they were all very happy.",
)
_REQUESTS = (
    "Tell me a story about a {kind} named {hero}.",
    "Tell me a story about a {trait} {kind} and a {ftrait} {fkind}.",
    "Tell me a story about {hero} and {friend}.",
    "Please tell me a story about {topic}.",
    "Tell me a story about a {trait} {kind} and {topic}.",
)

_HELPER_COMES = (
    '[Just then|Soon], a {ftrait} {fkind} named {friend} came by. "[Why are you so sad|What is '
    'the matter]?" asked {friend}.'
)
_THANKS = '"Thank you, {friend}!" said {hero}[, and {he} gave {fhim} a big hug.|. "You are a true friend."]'

PLOTS = (
    Plot(
        "a lost {toy}",
        (
            {
                "spot": "high up in a tall tree",
                "fetched": "climbed up the tree",
                "fkind": "squirrel|cat|bear",
            },
            {
                "spot": "at the bottom of the pond",
                "fetched": "dived into the cold water",
                "fkind": "duck|frog|turtle",
            },
            {
                "spot": "deep inside a dark hole",
                "fetched": "crawled into the hole",
                "fkind": "mouse|rabbit|hedgehog",
            },
            {
                "spot": "on top of a high roof",
                "fetched": "flew up to the roof",
                "fkind": "owl|dragon",
            },
        ),
        (
            "{hero} had a {color} {toy}, and {he} [took it everywhere|loved it very much].",
            "One [day|morning|afternoon], {hero} [ran and jumped|laughed and played] all day "
            "long. But when it was time to go home, the {color} {toy} was gone!",
            "{He} looked under the [bench|bushes] and behind the [rocks|trees], but {he} could not find it.",
            _HELPER_COMES + ' "I lost my {color} {toy}," said {hero}.',
            '"[Do not worry|Do not be sad], I will help you," said {friend}.',
            "At last, {friend} saw something {color} {spot}. It was the {toy}! {friend} "
            "{fetched} and brought it back.",
            _THANKS,
        ),
    ),
    Plot(
        "a friend who was stuck",
        (
            {"where": "in the deep mud", "tool": "rope", "fkind": "pig|goat|turtle|duck"},
            {"where": "up in a tall tree", "tool": "ladder", "fkind": "cat|mouse|boy|girl"},
            {"where": "in a deep hole", "tool": "rope", "fkind": "fox|rabbit|hedgehog|dog"},
            {"where": "on a rock in the river", "tool": "boat", "fkind": "goat|squirrel|bear"},
        ),
        (
            "One [day|morning|afternoon], {hero} was walking {place} when {he} heard a "
            '[small|sad] voice. "Help! Help!" cried the voice.',
            "{hero} [looked around|followed the voice]. A {ftrait} {fkind} named {friend} was stuck {where}!",
            '"[Please help me|I can not get out]," said {friend}.',
            '"[Do not be afraid|Wait for me], {friend}," said {hero}. "I have an idea!"',
            "{He} [ran home as fast as {he} could and came back|asked the old farmer, and came "
            "back] with a {tool}.",
            "{hero} [worked very hard|was very careful]. With the help of the {tool}, {friend} "
            "was soon [safe|free] again.",
            '"You saved me!" said {friend}. "How can I thank you?" "[Come and play with me|Just '
            'be my friend]," said {hero}.',
        ),
    ),
    Plot(
        "sharing a {food}",
        (
            {"gift": "a {color} flower", "fkind": _ANYBODY},
            {"gift": "a shiny {color} stone", "fkind": _ANYBODY},
            {"gift": "a basket of sweet berries", "fkind": _ANYBODY},
            {"gift": "a warm {color} scarf", "fkind": _ANYBODY},
        ),
        (
            "One [day|morning], the mother of {hero} gave {him} a big {food}. It [smelled|looked] so good!",
            "{hero} sat down to eat the {food} [in the warm sun|under a big tree]. There {he} "
            "saw a {ftrait} {fkind} named {friend}.",
            '{friend} [was all alone|had tears in {fhis} eyes]. "I am so hungry," said {friend}.',
            "{hero} looked at the {food}. {He} [was hungry too|wanted to eat it all]. But then "
            "{he} felt sorry for {friend}.",
            '"[We can share|Here, take half]," said {hero}. They ate together, and the {food} '
            "tasted [so good|even better with a friend].",
            'The next day, {friend} [came back|knocked on the door] with {gift}. "This is for '
            'you," said {friend}, "because you were so kind."',
            "{hero} learned that it is good to share.",
        ),
    ),
    Plot(
        "being brave",
        (
            {
                "fear": "the dark",
                "when": "when night came",
                "cure": "look at the stars. They are little lights in the dark",
                "did": "looked up at the bright stars",
                "fkind": "owl|mouse|fox|cat",
            },
            {
                "fear": "the thunder",
                "when": "when a storm came",
                "cure": "sing with me. Then the thunder is only a drum",
                "did": "sang as loud as {he} could",
                "fkind": "frog|dog|bear|girl",
            },
            {
                "fear": "deep water",
                "when": "when the others went to swim",
                "cure": "stay close to me. We can go in step by step",
                "did": "put one foot in the water, and then the other",
                "fkind": "duck|frog|turtle|boy",
            },
            {
                "fear": "high places",
                "when": "when the others climbed the hill",
                "cure": "look at me and not down. We can climb slowly",
                "did": "took one small step, and then one more",
                "fkind": "goat|squirrel|cat|boy",
            },
        ),
        (
            "{hero} was happy all day long, but {he} was afraid of {fear}.",
            '{When}, {hero} [hid under a blanket|closed {his} eyes|began to shake]. "I am so '
            'scared," {he} said.',
            "{His} friend {friend}, a {ftrait} {fkind}, heard {him}.",
            '"[Come with me|Do not be afraid]," said {friend}. "Just {cure}."',
            "{hero} took a deep breath. {He} {did}. [Nothing bad happened|It was not so bad]!",
            '"[I did it|Look at me]!" {he} said. "I knew you could do it," said {friend}. "You '
            'are very brave."',
            "After that, {hero} was not afraid of {fear} any more.",
        ),
    ),
    Plot(
        "making a {made}",
        (
            {
                "made": "kite",
                "part": "long string",
                "use": "flew high in the sky",
                "fkind": _ANYBODY,
            },
            {
                "made": "boat",
                "part": "big sail",
                "use": "sailed across the pond",
                "fkind": _ANYBODY,
            },
            {
                "made": "cake",
                "part": "cup of milk",
                "use": "tasted sweet and warm",
                "fkind": _ANYBODY,
            },
            {
                "made": "wagon",
                "part": "round wheel",
                "use": "rolled down the hill like the wind",
                "fkind": _ANYBODY,
            },
        ),
        (
            "One day, {hero} wanted to make a [big|beautiful] {color} {made}.",
            'But one thing was missing. "Oh no," said {hero}. "I need a {part}!"',
            '{He} asked the [old farmer|baker], but he said, "I am sorry, I have none."',
            'Then {he} met {his} friend {friend}, a {ftrait} {fkind}. "Do you have a {part}, '
            '{friend}?" asked {hero}.',
            '"[Yes|Of course], I have one at home!" said {friend}. {Fhe} ran home and [soon came '
            "back with it|brought it].",
            "They worked together [all afternoon|side by side]. When the {made} was ready, it {use}.",
            '"[We did it|Look at that]!" [shouted|cried] {hero}. "I could not have made it '
            'without you, {friend}."',
        ),
    ),
    Plot(
        "a long way to go",
        (
            {
                "goal": "see the sea",
                "block": "a wide river",
                "way": ('"Jump on my back, I can swim," said {friend}. {Fhe} carried {him} across the water'),
                "there": "the sea was big and blue",
                "fkind": "turtle|bear|dog",
            },
            {
                "goal": "find the end of the rainbow",
                "block": "a steep mountain",
                "way": ('"Hold on to me, I can fly," said {friend}. {Fhe} carried {him} over the top'),
                "there": "the colors of the rainbow were all around them",
                "fkind": "owl|dragon",
            },
            {
                "goal": "visit grandma",
                "block": "a big snow storm",
                "way": (
                    '"Come into my warm house," said {friend}. They drank hot milk until the '
                    "storm was over, and then they walked on together"
                ),
                "there": "grandma was so glad to see them that she made a cake",
                "fkind": "rabbit|hedgehog|bear|fox",
            },
            {
                "goal": "see the silver lake",
                "block": "a dark forest",
                "way": (
                    '"I know the way, follow me," said {friend}. {Fhe} walked in front with a little lamp'
                ),
                "there": "the lake was full of silver light",
                "fkind": "owl|fox|mouse|cat",
            },
        ),
        (
            "{hero} wanted to {goal}. So one [day|morning], {he} [packed {his} bag|put on {his} "
            "{color} hat|said goodbye to {his} mother] and went on {his} way.",
            '{He} walked and walked. But then {he} came to {block}. "[Oh no|Oh dear], how can I '
            'go on?" said {hero}.',
            '[Just then|Soon], a {ftrait} {fkind} named {friend} came by. "Where are you going?" '
            'asked {friend}. "I want to {goal}," said {hero}.',
            "{way}.",
            "At last they were there, and {there}. {hero} [had never seen anything so "
            "beautiful|could not stop smiling].",
            _THANKS,
        ),
    ),
    Plot(
        "telling the truth",
        (
            {"owned": "cup", "broke": "fell down and broke", "fix": "glue", "fkind": _ANYBODY},
            {"owned": "kite", "broke": "got a big hole", "fix": "paper", "fkind": _ANYBODY},
            {"owned": "hat", "broke": "was torn in two", "fix": "thread", "fkind": _ANYBODY},
            {"owned": "box", "broke": "broke into pieces", "fix": "wood", "fkind": _ANYBODY},
        ),
        (
            "{hero} liked to visit {his} friend {friend}, a {ftrait} {fkind}. {friend} had a "
            "beautiful {color} {owned}.",
            "One day, {hero} was [playing|jumping] in the house of {friend}. Oh no! The {color} "
            "{owned} {broke}.",
            "{hero} was scared. {He} hid the {owned} under the bed and [ran home|said nothing]. "
            "But that night {he} could not sleep.",
            'In the morning, {hero} went back. "I am sorry, {friend}," {he} said. "I broke your '
            '{color} {owned}."',
            '{friend} was quiet for a moment. Then {fhe} said, "Thank you for telling the truth. '
            '[That was brave|I am not angry]."',
            "{hero} [brought|found] some {fix}, and together they fixed the {owned}.",
            "{hero} learned that it is good to tell the truth.",
        ),
    ),
    Plot(
        "a lost baby {baby}",
        (
            {
                "baby": "bird",
                "sound": "peep",
                "nest": "in the old oak tree",
                "fkind": _ANY_ANIMAL,
            },
            {
                "baby": "goose",
                "sound": "honk",
                "nest": "by the green pond",
                "fkind": _ANY_ANIMAL,
            },
            {
                "baby": "cow",
                "sound": "moo",
                "nest": "in the big red barn",
                "fkind": _ANY_ANIMAL,
            },
            {
                "baby": "sheep",
                "sound": "baa",
                "nest": "on the other side of the fence",
                "fkind": _ANY_ANIMAL,
            },
        ),
        (
            "One [day|morning|evening], {hero} was [playing|walking] {place} when {he} heard a "
            'tiny sound. "{Sound}, {sound}!"',
            "It was a baby {baby}, and it was [all alone|cold and scared|lost].",
            '"[Poor little one|Do not cry]," said {hero}. "I will help you find your mother."',
            '{hero} asked {friend} the {fkind}, "Have you seen a mother {baby}?" "No," said '
            '{friend}, "but I can help you look."',
            "They looked [near the mill|by the bridge] and [behind the school|in the tall "
            "grass], but the mother {baby} was not there.",
            'Then {friend} stopped. "Listen!" {fhe} said. "{Sound}, {sound}!"',
            'They [ran|hurried] to the sound, and there was the mother {baby}, {nest}! "Thank '
            'you for bringing back my baby," she said.',
        ),
    ),
    Plot(
        "a new friend",
        (
            {"game": "hide and seek", "fkind": _ANYBODY},
            {"game": "catch with the {color} ball", "fkind": _ANYBODY},
            {"game": "pirates", "fkind": _ANYBODY},
            {"game": "jump rope", "fkind": _ANYBODY},
        ),
        (
            "One [sunny|cool|bright] [day|morning], {hero} went out to play. There {he} saw a "
            "{ftrait} {fkind} that {he} did not know.",
            "The {fkind} was [sitting under a tree|standing all alone] and did not [say a word|smile].",
            '"Hello, I am {hero}," said {hero}. "What is your name?" "My name is {friend}," said '
            'the {fkind}. "I am new here, and I [do not know anyone|have no friends]."',
            '"[You have one now|I will be your friend]," said {hero}. "Do you want to play {game}?"',
            "{friend} [smiled|nodded]. They played {game} until the sun went down.",
            'When it was time to go home, {hero} gave {friend} a {color} {toy}. "[Come back '
            'tomorrow|See you tomorrow]!" {he} said.',
        ),
    ),
    Plot(
        "a little seed",
        (
            {"plant": "sunflower", "became": "as tall as the house", "fkind": _ANYBODY},
            {"plant": "pumpkin", "became": "as big as a wagon", "fkind": _ANYBODY},
            {"plant": "pear tree", "became": "full of sweet pears", "fkind": _ANYBODY},
            {"plant": "rose", "became": "the most beautiful of all", "fkind": _ANYBODY},
        ),
        (
            'One [spring day|morning], {hero} found a tiny seed. "What is inside?" {he} asked.',
            "{He} [dug|made] a hole in the ground and put the seed in. Every day {he} gave it water.",
            "{He} waited and waited. But nothing [happened|came up], and {hero} was sad.",
            '"Do not give up," said {his} friend {friend}, a {ftrait} {fkind}. "[Good things '
            'take time|Seeds need time and sun]."',
            "The rain fell and the sun shone. Then, one morning, there was a little green leaf!",
            '"[Come and look|Look, look], {friend}!" [shouted|cried] {hero}. The plant grew and '
            "grew. It was a {plant}, and in the summer it was {became}.",
            "{hero} and {friend} [sang|danced] around the {plant}, and all the "
            "[animals|neighbors] came to see it.",
        ),
    ),
)


def make_stories(seed: int) -> Iterator[Story]:
    """Stories without end; the same seed gives the same ones."""
    rng = random.Random(seed)
    while True:
        yield _make_story(rng)


def _make_story(rng: random.Random) -> Story:
    plot = rng.choice(PLOTS)
    cast = {"topic": plot.topic, **_draw_cast(rng), **rng.choice(plot.props)}
    kinds = [kind for kind in cast["fkind"].split("|") if kind != cast["kind"]]
    cast["fkind"] = rng.choice(kinds)
    cast.update(_draw_person(rng, cast["fkind"], other=cast["hero"], prefix="f"))
    cast["friend"] = cast.pop("fname")
    scenes = (*plot.scenes, rng.choice(_ENDINGS))
    return Story(
        opening=_fill(rng.choice(_OPENINGS), cast, rng),
        body=" ".join(_fill(scene, cast, rng) for scene in scenes),
        request=_fill(rng.choice(_REQUESTS), cast, rng),
        oddity=_make_oddity(cast, rng),
    )


def _make_oddity(cast: dict[str, str], rng: random.Random) -> str:
    """The start of some scene; half of its words, but not the hero, make place for nonsense."""
    scenes = []
    for plot in rng.choices(PLOTS, k=2):
        scene = rng.choice((plot.scenes[0], rng.choice(plot.scenes)))
        scenes.append(_fill(scene, {**rng.choice(plot.props), **cast}, rng).split())
    odd = []
    for word in scenes[0][: rng.randint(3, 14)]:
        other = rng.choice(scenes[1])
        made_up = word[: rng.randint(1, 4)] + other[-rng.randint(1, 4) :]
        is_hero = word.startswith(cast["hero"])
        odd.append(word if is_hero else rng.choice((word, word, other, made_up)))
    return " ".join(odd).rstrip('.,!?"') + rng.choice((".", ".", "!", "?", ""))


def _draw_cast(rng: random.Random) -> dict[str, str]:
    kind = rng.choice((*_ANIMALS, *("boy", "girl") * 4))
    hero = _draw_person(rng, kind)
    cast = {name: rng.choice(choices) for name, choices in _THINGS.items()}
    return {**cast, **hero, "hero": hero["name"], "kind": kind, "place": rng.choice(_PLACES)}


def _draw_person(rng: random.Random, kind: str, other: str = "", prefix: str = "") -> dict[str, str]:
    """Fields of somebody of this kind, whose name is not ``other``; names tell he from she."""
    names = {"boy": _BOYS, "girl": _GIRLS}.get(kind, _HE_ANIMALS + _SHE_ANIMALS)
    name = rng.choice([name for name in names if name != other])
    he, him, his = ("she", "her", "her") if name in _GIRLS + _SHE_ANIMALS else ("he", "him", "his")
    person = {"name": name, "trait": rng.choice(_TRAITS), "he": he, "him": him, "his": his}
    return {prefix + field: value for field, value in person.items()}


def _fill(template: str, cast: dict[str, str], rng: random.Random) -> str:
    """Choose alternatives, then fill fields, whose values may hold fields themselves."""
    text = re.sub(r"\[([^\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)
    fields = {**cast, **{name.capitalize(): _capitalized(value) for name, value in cast.items()}}
    while "{" in text:
        text = text.format_map(fields)
    return text


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
