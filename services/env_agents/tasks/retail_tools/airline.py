"""The airline domain: reservations, flights, bags."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from services.env_agents.tasks.retail_tools.lookup import entry, id_by_email
from services.env_agents.tasks.retail_tools.people import distinct_ids, people, who
from services.env_agents.tasks.retail_tools.scenario import Call, Database, Want
from services.env_agents.tools import ToolFault

AIRPORTS = ("AMS", "CDG", "FRA", "LHR", "MAD", "VIE", "ZRH")

MAX_BAGS = 3


class Airline:
    """Satisfies `Domain`."""

    name = "airline"
    policy = """You are a customer service agent of an airline. Help users with their reservations.
- First find out who the user is: by user id, or by email with find_user_by_email.
- Only reservations of that user may be shown or changed.
- Business reservations may be changed to another flight of the same route that has seats. Economy
  reservations cannot be changed.
- A reservation may be cancelled if it is business or insured.
- Bags may be added up to three in all; they are never taken away.
- If a request is not allowed by these rules, change nothing and call transfer_to_human with the
  reason policy.
- Before any change, say what you are about to do and ask the user to confirm.
- Do one thing at a time, and do only what was asked. When everything is done, ask whether there
  is anything else."""

    def tools(self, database: Database) -> Sequence[Callable[..., Any]]:
        users, flights = database["users"], database["flights"]

        def reservation(reservation_id: str) -> dict[str, Any]:
            if reservation_id not in database["reservations"]:
                raise ToolFault(f"no reservation {reservation_id}")
            found = database["reservations"][reservation_id]
            if found["status"] != "booked":
                raise ToolFault(f"reservation {reservation_id} is {found['status']}")
            return found

        def find_user_by_email(email: str) -> str:
            """Return the user id of an email address."""
            return id_by_email(users, "user", email)

        def get_user(user_id: str) -> dict[str, Any]:
            """Return a user's name, email and reservations."""
            return entry(users, "user", user_id)

        def get_reservation(reservation_id: str) -> dict[str, Any]:
            """Return a reservation: flight, cabin, insurance, bags."""
            return reservation(reservation_id)

        def search_flights(origin: str, destination: str) -> dict[str, Any]:
            """Return the flights between two airports: departure, price, seats."""
            return {
                number: flight
                for number, flight in flights.items()
                if (flight["origin"], flight["destination"]) == (origin, destination)
            }

        def change_flight(reservation_id: str, flight: str) -> str:
            """Move a business reservation to another flight of the same route."""
            found = reservation(reservation_id)
            if flight not in flights or not flights[flight]["seats"]:
                raise ToolFault(f"flight {flight} does not exist or has no seats")
            if found["cabin"] != "business":
                raise ToolFault("economy reservations cannot be changed")
            old = flights[found["flight"]]
            if any(old[end] != flights[flight][end] for end in ("origin", "destination")):
                raise ToolFault(f"flight {flight} flies another route")
            old["seats"] += 1
            flights[flight]["seats"] -= 1
            found["flight"] = flight
            return "changed"

        def add_bags(reservation_id: str, bags: int) -> str:
            """Add so many bags to a reservation."""
            found = reservation(reservation_id)
            if bags < 1 or found["bags"] + bags > MAX_BAGS:
                raise ToolFault(f"a reservation has at most {MAX_BAGS} bags")
            found["bags"] += bags
            return f"{found['bags']} bags"

        def cancel_reservation(
            reservation_id: str, reason: Literal["change_of_plan", "illness"]
        ) -> str:
            """Cancel a business or insured reservation."""
            found = reservation(reservation_id)
            if found["cabin"] != "business" and not found["insured"]:
                raise ToolFault("neither business nor insured")
            found.update(status="cancelled", reason=reason)
            return "cancelled"

        def transfer_to_human(reason: Literal["policy", "other"]) -> str:
            """Hand the user over to a human agent."""
            database["transfers"]["1"] = {"reason": reason}
            return "transferred"

        return (find_user_by_email, get_user, get_reservation, search_flights, change_flight,
                add_bags, cancel_reservation, transfer_to_human)  # fmt: skip

    def draw(self, rng: random.Random, personality: str) -> tuple[Database, Want]:
        database = _database(rng)
        user_id = rng.choice(list(database["users"]))
        user = database["users"][user_id]
        kinds = ["change", "bags", "cancel", "denied", "departure"]
        kind = "change" if personality == "wavering" else rng.choice(kinds)
        # The first reservation is business, the second economy and not insured.
        number = user["reservations"][1 if kind in ("denied", "bags") else 0]
        facts = who({"user_id": user_id, **user}, personality)
        facts["reservation"] = f"It is reservation {number}."
        lookups: list[Call] = [("get_reservation", {"reservation_id": number})]
        if personality == "forgetful":
            lookups.insert(0, ("find_user_by_email", {"email": user["email"]}))
        want = _want(kind, rng, database, number, wavers=personality == "wavering")
        return database, Want(
            goal=want.goal,
            facts={**facts, **want.facts},
            calls=(*lookups, *want.calls),
            required=want.required,
            change=want.change,
        )


def _want(kind: str, rng: random.Random, database: Database, number: str, *, wavers: bool) -> Want:
    found = database["reservations"][number]
    flight = database["flights"][found["flight"]]
    match kind:
        case "change":
            route = {"origin": flight["origin"], "destination": flight["destination"]}
            others = [
                n
                for n, f in database["flights"].items()
                if n != found["flight"] and f["seats"] and f["origin"] == flight["origin"]
            ]
            wish, final = rng.sample(others, 2)
            departs = {n: database["flights"][n]["departs"] for n in (wish, final)}
            told = departs[wish if wavers else final]
            change = f"Wait, {departs[final]} suits me better. Take that one, please."
            return Want(
                "I want to fly at another time of the day.",
                {"time": f"I would like to leave at {told}."},
                [
                    ("search_flights", route),
                    ("change_flight", {"reservation_id": number, "flight": final}),
                ],
                change=change if wavers else "",
            )
        case "bags":
            bags = rng.randint(1, MAX_BAGS - found["bags"])
            return Want(
                "I want to take more luggage.",
                {"bags": f"I need {bags} more bag{'s' if bags > 1 else ''}."},
                [("add_bags", {"reservation_id": number, "bags": bags})],
            )
        case "cancel":
            reason = rng.choice(["change_of_plan", "illness"])
            why = "my plans have changed" if reason == "change_of_plan" else "I have fallen ill"
            arguments = {"reservation_id": number, "reason": reason}
            return Want(
                "I want to cancel a reservation.",
                {"reason": f"The reason: {why}."},
                [("cancel_reservation", arguments)],
            )
        case "denied":
            return Want(
                "I want to cancel a reservation.",
                {"reason": "The reason: my plans have changed."},
                [("transfer_to_human", {"reason": "policy"})],
            )
        case _:
            return Want(
                "I need to know when my flight leaves.",
                {},
                [("search_flights", {k: flight[k] for k in ("origin", "destination")})],
                required=(flight["departs"],),
            )


def _database(rng: random.Random) -> Database:
    origin, *destinations = rng.sample(AIRPORTS, 3)
    numbers = distinct_ids(rng, "LW", 8, digits=3)
    hours = rng.sample(range(6, 22), 8)
    flights: dict[str, Any] = {
        number: {
            "origin": origin if index < 4 else destinations[1],
            "destination": destinations[0],
            "departs": f"{hours[index]:02d}:{rng.choice(('05', '20', '45'))}",
            "price": rng.randint(60, 300),
            "seats": rng.randint(1, 9),
        }
        for index, number in enumerate(numbers)
    }
    users: dict[str, Any] = {}
    reservations: dict[str, Any] = {}
    codes = distinct_ids(rng, "R", 4)
    for index, person in enumerate(people(rng, 2)):
        owned = codes[2 * index : 2 * index + 2]
        for code, cabin in zip(owned, ("business", "economy"), strict=True):
            reservations[code] = {
                "user_id": person["user_id"],
                "flight": rng.choice(numbers[4 * index : 4 * index + 4]),
                "cabin": cabin,
                "insured": False,
                "bags": rng.randint(0, MAX_BAGS - 1),
                "status": "booked",
            }
        users[person["user_id"]] = {
            "name": person["name"],
            "email": person["email"],
            "reservations": owned,
        }
    return {"users": users, "flights": flights, "reservations": reservations, "transfers": {}}
