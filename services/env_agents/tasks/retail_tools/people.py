"""Names, addresses and ids that tasks are drawn from. Pure."""

from __future__ import annotations

import random

FIRST = ("Ada", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jonas",
         "Kofi", "Lena", "Mei", "Noor", "Oskar", "Priya")  # fmt: skip
LAST = ("Alvarez", "Brandt", "Costa", "Dubois", "Eriksen", "Fofana", "Garcia", "Haddad", "Ito",
        "Jensen", "Kaya", "Lind", "Moreau", "Novak", "Okafor", "Park")  # fmt: skip
STREETS = ("Elm Street", "Harbour Road", "Mill Lane", "Oak Avenue", "Station Square")


def people(rng: random.Random, count: int) -> list[dict[str, str]]:
    """Draw people with different names and ids."""
    names = rng.sample([(first, last) for first in FIRST for last in LAST], count)
    return [
        {
            "user_id": f"{first}_{last}_{rng.randint(1000, 9999)}".lower(),
            "name": f"{first} {last}",
            "email": f"{first}.{last}{rng.randint(1, 99)}@example.com".lower(),
            "phone": f"555-{rng.randint(0, 999):03d}-{index}{rng.randint(0, 999):03d}",
        }
        for index, (first, last) in enumerate(names)
    ]


def address(rng: random.Random) -> str:
    """Draw an address."""
    return f"{rng.randint(1, 200)} {rng.choice(STREETS)}"


def distinct_ids(rng: random.Random, prefix: str, count: int, digits: int = 5) -> list[str]:
    """Draw different ids."""
    low = 10 ** (digits - 1)
    return [f"{prefix}{number}" for number in rng.sample(range(low, 10 * low), count)]


def who(person: dict[str, str], personality: str) -> dict[str, str]:
    """What a user says about themselves: the id, or what it can be found by."""
    if personality == "forgetful":
        return {"email": f"I do not remember my user id; my email is {person['email']}."}
    return {"user id": f"My user id is {person['user_id']}."}
