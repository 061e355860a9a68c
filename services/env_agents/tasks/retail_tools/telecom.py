"""The telecom domain: lines, plans, bills."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from services.env_agents.tasks.retail_tools.lookup import entry, id_by_email
from services.env_agents.tasks.retail_tools.people import distinct_ids, people
from services.env_agents.tasks.retail_tools.scenario import Call, Database, Want
from services.env_agents.tools import ToolFault

PLANS = ("Basic", "Comfort", "Family", "Nomad", "Unlimited")


class Telecom:
    """Satisfies `Domain`."""

    name = "telecom"
    policy = """You are a customer service agent of a mobile operator. Help users with their lines.
- First find out who the user is: by customer id, or by email with find_customer_by_email.
- Only lines and bills of that customer may be shown or changed.
- The plan of an active line may be changed, and roaming may be added to it. Nothing may be changed
  on a suspended line while one of its bills is unpaid.
- To reactivate a suspended line, its unpaid bill is paid first, then the line is reset.
- If a request is not allowed by these rules, change nothing and call transfer_to_human with the
  reason policy.
- Before any change, say what you are about to do and ask the user to confirm.
- Do one thing at a time, and do only what was asked. When everything is done, ask whether there
  is anything else."""

    def tools(self, database: Database) -> Sequence[Callable[..., Any]]:
        customers, lines, bills = database["customers"], database["lines"], database["bills"]

        def line(line_id: str, status: str = "") -> dict[str, Any]:
            if line_id not in lines:
                raise ToolFault(f"no line {line_id}")
            if status and lines[line_id]["status"] != status:
                raise ToolFault(f"line {line_id} is {lines[line_id]['status']}")
            return lines[line_id]

        def find_customer_by_email(email: str) -> str:
            """Return the customer id of an email address."""
            return id_by_email(customers, "customer", email)

        def get_customer(customer_id: str) -> dict[str, Any]:
            """Return a customer's name, email and lines."""
            return entry(customers, "customer", customer_id)

        def get_line(line_id: str) -> dict[str, Any]:
            """Return a line: plan, status, data left, roaming days."""
            return line(line_id)

        def list_plans() -> dict[str, Any]:
            """Return all plans: data and price a month."""
            return database["plans"]

        def get_bills(line_id: str) -> dict[str, Any]:
            """Return the bills of a line."""
            line(line_id)
            return {number: bill for number, bill in bills.items() if bill["line"] == line_id}

        def change_plan(line_id: str, plan: str) -> str:
            """Change the plan of an active line."""
            if plan not in database["plans"]:
                raise ToolFault(f"no plan {plan}")
            line(line_id, "active")["plan"] = plan
            return "changed"

        def add_roaming(line_id: str, days: int) -> str:
            """Add days of roaming to an active line."""
            if not 1 <= days <= 30:
                raise ToolFault("roaming is added for 1 to 30 days")
            line(line_id, "active")["roaming_days"] += days
            return "added"

        def pay_bill(bill_id: str) -> str:
            """Charge an unpaid bill to the customer's card."""
            if bill_id not in bills or bills[bill_id]["paid"]:
                raise ToolFault(f"no unpaid bill {bill_id}")
            bills[bill_id]["paid"] = True
            return "paid"

        def reset_line(line_id: str) -> str:
            """Reactivate a suspended line whose bills are paid."""
            found = line(line_id, "suspended")
            if any(bill["line"] == line_id and not bill["paid"] for bill in bills.values()):
                raise ToolFault(f"line {line_id} has an unpaid bill")
            found["status"] = "active"
            return "active"

        def transfer_to_human(reason: Literal["policy", "other"]) -> str:
            """Hand the user over to a human agent."""
            database["transfers"]["1"] = {"reason": reason}
            return "transferred"

        return (find_customer_by_email, get_customer, get_line, list_plans, get_bills,
                change_plan, add_roaming, pay_bill, reset_line, transfer_to_human)  # fmt: skip

    def draw(self, rng: random.Random, personality: str) -> tuple[Database, Want]:
        database = _database(rng)
        customer_id = rng.choice(list(database["customers"]))
        customer = database["customers"][customer_id]
        kinds = ["plan", "roaming", "reactivate", "denied", "data"]
        kind = "plan" if personality == "wavering" else rng.choice(kinds)
        # The first line is active, the second suspended with an unpaid bill.
        line_id = customer["lines"][1 if kind in ("reactivate", "denied") else 0]
        facts = {"customer id": f"My customer id is {customer_id}."}
        lookups: list[Call] = [("get_line", {"line_id": line_id})]
        if personality == "forgetful":
            facts = {"email": f"I have no customer id at hand; my email is {customer['email']}."}
            lookups.insert(0, ("find_customer_by_email", {"email": customer["email"]}))
        facts["line"] = f"It is line {line_id}."
        want = _want(kind, rng, database, line_id, wavers=personality == "wavering")
        return database, Want(
            goal=want.goal,
            facts={**facts, **want.facts},
            calls=(*lookups, *want.calls),
            required=want.required,
            change=want.change,
        )


def _want(kind: str, rng: random.Random, database: Database, line_id: str, *, wavers: bool) -> Want:
    line = database["lines"][line_id]
    match kind:
        case "plan":
            others = [name for name in database["plans"] if name != line["plan"]]
            wish, final = rng.sample(others, 2)
            return Want(
                "I want another plan.",
                {"plan": f"I would like the {wish if wavers else final} plan."},
                [("list_plans", {}), ("change_plan", {"line_id": line_id, "plan": final})],
                change=f"Hm, no: the {final} plan is better for me." if wavers else "",
            )
        case "roaming":
            days = rng.randint(1, 30)
            return Want(
                "I am going abroad and need roaming.",
                {"days": f"I need it for {days} day{'s' if days > 1 else ''}."},
                [("add_roaming", {"line_id": line_id, "days": days})],
            )
        case "reactivate":
            bill_id = next(n for n, b in database["bills"].items() if b["line"] == line_id)
            return Want(
                "My phone has no service. Please charge whatever is open and switch it on again.",
                {},
                [
                    ("get_bills", {"line_id": line_id}),
                    ("pay_bill", {"bill_id": bill_id}),
                    ("reset_line", {"line_id": line_id}),
                ],
            )
        case "denied":
            return Want(
                "I want the Unlimited plan. I will not pay any open bill now.",
                {},
                [("transfer_to_human", {"reason": "policy"})],
            )
        case _:
            return Want(
                "I need to know how much data I have left.",
                {},
                [],
                required=(line["data_left"],),
            )


def _database(rng: random.Random) -> Database:
    plans = {
        name: {"data": f"{rng.randint(1, 9) * 10} GB", "price": rng.randint(5, 60)}
        for name in PLANS
    }
    customers: dict[str, Any] = {}
    lines: dict[str, Any] = {}
    bills: dict[str, Any] = {}
    line_ids = distinct_ids(rng, "L", 4)
    bill_ids = distinct_ids(rng, "B", 4)
    for index, person in enumerate(people(rng, 2)):
        owned = line_ids[2 * index : 2 * index + 2]
        for at, (line_id, status) in enumerate(zip(owned, ("active", "suspended"), strict=True)):
            lines[line_id] = {
                "plan": rng.choice(PLANS[:4]),
                "status": status,
                "data_left": f"{rng.randint(1, 99) / 10:.1f} GB",
                "roaming_days": rng.randint(0, 5),
            }
            bills[bill_ids[2 * index + at]] = {
                "line": line_id,
                "amount": rng.randint(10, 70),
                "paid": status == "active",
            }
        customers[person["user_id"]] = {
            "name": person["name"],
            "email": person["email"],
            "lines": owned,
        }
    return {"customers": customers, "lines": lines, "plans": plans, "bills": bills,
            "transfers": {}}  # fmt: skip
