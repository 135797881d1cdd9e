"""Three small jobs with generated data: orders to JSON, a word for a ticket, questions to SQL.

The data comes from a seed alone. The held-out prompts share no name, no item, no value and no ticket sentence with the
training prompts, so an adapter has to do the job and cannot recall the answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

TRAIN_SEED: Final = 1
HELD_OUT_SEED: Final = 2
HELD_OUT: Final = 40
"""The held-out prompts of a task that the adapters' cards report; the demo asks the first of them."""


@dataclass(frozen=True)
class Example:
    """One prompt and the one right answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One job: its instruction (the chat's system message) and how an example of it is made."""

    name: str
    title: str
    system: str
    draw: Callable[[random.Random, bool], Example]

    def _distinct(self, seed: int, count: int, held_out: bool) -> list[Example]:
        rng = random.Random(f"{self.name}-{seed}")
        found: dict[str, Example] = {}
        tries = 0
        while len(found) < count:
            example = self.draw(rng, held_out)
            found.setdefault(example.prompt, example)
            tries += 1
            if tries > 200 * count:
                raise ValueError(f"the task {self.name} has fewer than {count} distinct prompts")
        return list(found.values())

    def train(self, count: int) -> list[Example]:
        """The first `count` training examples."""
        return self._distinct(TRAIN_SEED, count, held_out=False)

    def held_out(self, count: int = HELD_OUT) -> list[Example]:
        """The first `count` held-out examples."""
        return self._distinct(HELD_OUT_SEED, count, held_out=True)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The chat a model is asked to continue."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": prompt}]


def _split(words: str, held_out: bool) -> list[str]:
    """Every fourth word is kept for the held-out prompts."""
    return [word for at, word in enumerate(words.split()) if (at % 4 == 3) == held_out]


# ------------------------------------------------------------------------------------------- orders to JSON

# The words to be copied are common ones, which the tokenizer keeps whole: a model this small spells rare words badly.
_NAMES: Final = """Adam Alex Alice Andrew Ann Anna Anne Arthur Ben Bill Bob Charles Chris Dan Daniel David Edward
Elizabeth Emily Frank Fred George Greg Henry Jack James Jane Jeff Jim John Joseph Ken Lee Louis Maria Mark Martin Mary
Matthew Max Michael Nick Paul Peter Ray Richard Robert Sam Samuel Sarah Scott Simon Stephen Thomas Tim Tom Victor
William"""
_ITEMS: Final = """apples bags balls beans belts birds blocks boards boats books boxes brushes cards cars cats chairs
chips coins computers devices dogs doors files filters flags flowers frames games images keys kits letters lights maps
masks models nuts packs papers parts phones photos planes plants records seeds sets sheets ships shirts stones tables
tools trees units windows"""
_ORDERS: Final = (
    "{who} wants to buy {n} {what}.",
    "{who} ordered {n} {what} yesterday.",
    "Please send {n} {what} to {who}.",
    "We need {n} {what} for {who}.",
    "{who} asked us for {n} {what}.",
    "Ship {n} {what} to {who} today.",
    "An order came in: {n} {what}, customer {who}.",
    "The customer {who} takes {n} {what}.",
)


def _order(rng: random.Random, held_out: bool) -> Example:
    who = rng.choice(_split(_NAMES, held_out))
    what = rng.choice(_split(_ITEMS, held_out))
    n = rng.randint(2, 60)
    prompt = rng.choice(_ORDERS).format(who=who, n=n, what=what)
    return Example(prompt, f'{{"who":"{who}","qty":{n},"item":"{what}"}}')


# ------------------------------------------------------------------------------------ tickets to queues

_TICKETS: Final[dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "payment": (
        (
            "My card was charged twice this month.",
            "The invoice shows the wrong amount.",
            "Why did the monthly price go up?",
            "I was billed for a plan I never chose.",
            "Please send me a receipt for my last payment.",
            "The discount is missing from my bill.",
            "Your invoice has the wrong tax number on it.",
            "My credit card payment keeps being declined.",
            "I paid the invoice but it is still marked unpaid.",
            "There is an unknown charge on my bank statement.",
            "Can I pay by bank transfer instead of by card?",
            "I still have not received my refund of the payment.",
        ),
        (
            "You took the money from my card two times.",
            "The total on my invoice is too high.",
            "I need a receipt for the payment in May.",
            "My payment was declined although the card is valid.",
            "I do not understand this charge on my bill.",
            "The tax on the invoice is wrong.",
            "I was charged the full price without the discount.",
        ),
    ),
    "delivery": (
        (
            "My package has not arrived yet.",
            "The parcel was delivered to the wrong address.",
            "Where is my order? It should have been here on Monday.",
            "The box was damaged when the courier brought it.",
            "The tracking number does not show my parcel.",
            "Can you deliver the package to my office instead?",
            "The courier left the box in the rain.",
            "Half of the items were missing from the package.",
            "How long does shipping to Canada take?",
            "The delivery has been delayed for two weeks.",
            "The shipment is stuck at customs.",
            "I want to change the delivery address of my parcel.",
        ),
        (
            "The package was supposed to come last week.",
            "The courier delivered my parcel to a neighbour.",
            "The tracking page says my shipment is lost.",
            "The parcel arrived with a broken box.",
            "When will my package be delivered?",
            "Shipping is taking far too long.",
            "One item was missing in the delivered box.",
        ),
    ),
    "password": (
        (
            "I forgot my password.",
            "I cannot log in to my account.",
            "My account has been locked after three attempts.",
            "The password reset email never comes.",
            "The login code is not accepted.",
            "How do I change my password?",
            "I lost the phone with my login codes.",
            "Someone else has signed in to my account.",
            "My username is not recognised when I sign in.",
            "The sign in page says my password is wrong.",
            "I want to change the email address I log in with.",
            "Please unlock my account, I am locked out.",
        ),
        (
            "I am locked out of my account.",
            "The password I set yesterday does not work.",
            "I do not get the login code on my phone.",
            "Please reset my password.",
            "The site does not let me sign in any more.",
            "I forgot the username of my account.",
            "I think a stranger knows my password.",
        ),
    ),
    "error": (
        (
            "The app crashes when I open it.",
            "The screen stays black after the update.",
            "I get an error message when I press save.",
            "The search button does nothing.",
            "The program freezes every few minutes.",
            "The page shows error 500.",
            "The app is very slow since the last version.",
            "The export writes an empty file.",
            "The video stops playing after ten seconds.",
            "Pictures do not load in the app.",
            "The window closes by itself while I am typing.",
            "The new version does not start on my laptop.",
        ),
        (
            "The app crashes whenever I upload a picture.",
            "The program shows an error and closes.",
            "The screen freezes when I scroll.",
            "Since the update the app does not start.",
            "The save button does not work.",
            "The page stays empty and shows an error.",
            "The software is slow and freezes on my laptop.",
        ),
    ),
    "idea": (
        (
            "It would be great to have a dark mode.",
            "Could you add a calendar view?",
            "I wish I could sort the list by date.",
            "Please add support for Spanish.",
            "A feature to share folders would be nice.",
            "I suggest adding keyboard shortcuts.",
            "It would help if the app had a bigger font.",
            "Please consider adding a widget.",
            "My idea: let users choose their own colors.",
            "Could you build a version for tablets?",
            "I would love to see a weekly summary.",
            "A button to copy all the rows would be useful.",
        ),
        (
            "It would be nice to have a bigger calendar.",
            "Could you add support for French?",
            "I suggest a feature to sort folders.",
            "I wish the app had a widget for notes.",
            "Please add a button to choose the font.",
            "I would love to have a version for my watch.",
            "My suggestion: add a summary for every month.",
        ),
    ),
    "cancel": (
        (
            "I want to cancel my subscription.",
            "Please delete all my data.",
            "How do I stop the automatic renewal?",
            "I no longer need the service, please end it.",
            "Close my membership at the end of the month.",
            "I am moving to another provider, cancel my plan.",
            "Remove my profile and everything in it.",
            "Please end my contract.",
            "I do not want to continue after the trial.",
            "Unsubscribe me from the service.",
            "Stop my membership right now.",
            "I would like to terminate the contract this year.",
        ),
        (
            "Please cancel my membership.",
            "I want to end the subscription today.",
            "How can I terminate my plan?",
            "Delete my profile and all of my data.",
            "I do not want to renew the contract.",
            "I am leaving, please stop the service.",
            "I would like to unsubscribe and go to another provider.",
        ),
    ),
}
_OPENERS: Final = (
    "",
    "Hi, ",
    "Hello, ",
    "Good morning. ",
    "Dear team, ",
    "Quick question. ",
    "Hey there. ",
    "Urgent! ",
)
_CLOSERS: Final = ("", " Thanks.", " Thank you!", " Please help.", " Regards", " Best wishes")


def _ticket(rng: random.Random, held_out: bool) -> Example:
    queue = rng.choice(sorted(_TICKETS))
    train, kept = _TICKETS[queue]
    sentence = rng.choice(kept if held_out else train)
    return Example(f"Ticket: {rng.choice(_OPENERS)}{sentence}{rng.choice(_CLOSERS)}", queue)


# ------------------------------------------------------------------------------------------ questions to SQL

_COLUMNS: Final[tuple[tuple[str, str, str, str], ...]] = (
    (
        "users",
        "country",
        "live in",
        """Africa America Australia Brazil Britain California Canada China Egypt England Europe Florida France Germany
        India Iran Israel Italy Japan Mexico Russia Spain Texas Oxford""",
    ),
    (
        "orders",
        "status",
        "have the status",
        """active broken closed complete done draft empty failed final fixed free full held hidden late lost missing new
        open paid pending ready sent valid""",
    ),
    ("cars", "color", "have the color", "black blue brown gold gray green orange purple red white yellow dark"),
    ("notes", "author", "were written by", _NAMES),
    (
        "films",
        "genre",
        "are about",
        "action crime culture family fashion food history love magic music nature science space travel war",
    ),
    (
        "staff",
        "team",
        "work in",
        """content data design energy engineering health legal management media network operations policy press product
        quality research security service software strategy support testing training""",
    ),
)
_QUESTIONS: Final[tuple[tuple[str, str], ...]] = (
    ("How many {table} {verb} {value}?", "SELECT COUNT(*) FROM {table} WHERE {column} = '{value}'"),
    ("Count the {table} that {verb} {value}.", "SELECT COUNT(*) FROM {table} WHERE {column} = '{value}'"),
    ("Which {table} {verb} {value}?", "SELECT * FROM {table} WHERE {column} = '{value}'"),
    ("Show all {table} that {verb} {value}.", "SELECT * FROM {table} WHERE {column} = '{value}'"),
    ("List the {table} that {verb} {value}.", "SELECT * FROM {table} WHERE {column} = '{value}'"),
)


def _question(rng: random.Random, held_out: bool) -> Example:
    table, column, verb, values = rng.choice(_COLUMNS)
    question, query = rng.choice(_QUESTIONS)
    slots = {"table": table, "column": column, "verb": verb, "value": rng.choice(_split(values, held_out))}
    return Example(question.format(**slots), query.format(**slots))


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        Task("json", "orders to JSON", "Extract who, qty and item as compact JSON.", _order),
        Task("triage", "tickets to queues", f"Answer with one word: {', '.join(_TICKETS)}.", _ticket),
        Task("sql", "questions to SQL", "Answer with one SQL query.", _question),
    )
}
