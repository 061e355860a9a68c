"""The retail domain: orders, items, returns."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal

from services.env_agents.tasks.retail_tools.lookup import entry, id_by_email
from services.env_agents.tasks.retail_tools.people import address, distinct_ids, people, who
from services.env_agents.tasks.retail_tools.scenario import Call, Database, Want
from services.env_agents.tools import ToolFault

PRODUCTS = ("backpack", "desk lamp", "kettle", "notebook", "raincoat", "speaker", "water bottle")
COLOURS = ("black", "blue", "green", "red", "white")
KINDS = ("cancel", "address", "return", "exchange", "denied", "total")
"""Of wishes."""

Refund = Literal["original_payment", "gift_card"]


class Retail:
    """Satisfies `Domain`.

    Args:
        name: of the domain.
        kinds: wishes that are drawn; a wavering user always wants an exchange.
        id_digits: of order and item ids.
    """

    policy = """You are a customer service agent of an online shop. Help the user with their orders.
- First find out who the user is: by user id, or by email with find_user_by_email.
- Only orders of that user may be shown or changed.
- An order with status pending may be cancelled, and its address may be changed. An order with
  status delivered may be returned or its items exchanged for another variant of the same product
  that is available.
- Refunds of a return go to the original payment or to a gift card, as the user wishes.
- If a request is not allowed by these rules, change nothing and call transfer_to_human with the
  reason policy.
- Before any change, say what you are about to do and ask the user to confirm.
- Do one thing at a time, and do only what was asked. When everything is done, ask whether there
  is anything else."""

    def __init__(
        self, name: str = "retail", kinds: Sequence[str] = KINDS, id_digits: int = 5
    ) -> None:
        self.name = name
        self._kinds = tuple(kinds)
        self._id_digits = id_digits

    def tools(self, database: Database) -> Sequence[Callable[..., Any]]:
        users, orders, products = database["users"], database["orders"], database["products"]

        def order(order_id: str, status: str = "") -> dict[str, Any]:
            if order_id not in orders:
                raise ToolFault(f"no order {order_id}")
            found = orders[order_id]
            if status and found["status"] != status:
                raise ToolFault(f"order {order_id} is {found['status']}, not {status}")
            return found

        def find_user_by_email(email: str) -> str:
            """Return the user id of an email address."""
            return id_by_email(users, "user", email)

        def get_user(user_id: str) -> dict[str, Any]:
            """Return a user's name, email and orders."""
            return entry(users, "user", user_id)

        def get_order(order_id: str) -> dict[str, Any]:
            """Return an order: status, address, items, total."""
            return order(order_id)

        def get_product(product: str) -> dict[str, Any]:
            """Return the variants of a product: item id, colour, price, availability."""
            if product not in products:
                raise ToolFault(f"no product {product}; there are {', '.join(products)}")
            return products[product]

        def cancel_order(order_id: str, reason: Literal["no_longer_needed", "mistake"]) -> str:
            """Cancel a pending order."""
            order(order_id, "pending").update(status="cancelled", reason=reason)
            return "cancelled"

        def change_address(order_id: str, new_address: str) -> str:
            """Change the address of a pending order."""
            order(order_id, "pending")["address"] = new_address
            return "changed"

        def return_items(order_id: str, item_ids: list[str], refund_to: Refund) -> str:
            """Return items of a delivered order."""
            found = order(order_id, "delivered")
            held = {item["item_id"] for item in found["items"]}
            if not item_ids or not set(item_ids) <= held:
                raise ToolFault(f"order {order_id} has the items {', '.join(sorted(held))}")
            found.update(status="return requested", returns=sorted(item_ids), refund_to=refund_to)
            return "return requested"

        def exchange_item(order_id: str, item_id: str, new_item_id: str) -> str:
            """Exchange an item of a delivered order for another variant of the same product."""
            found = order(order_id, "delivered")
            held = {item["item_id"]: item for item in found["items"]}
            if item_id not in held:
                raise ToolFault(f"order {order_id} has no item {item_id}")
            variants = products[held[item_id]["product"]]["variants"]
            if new_item_id not in variants or not variants[new_item_id]["available"]:
                raise ToolFault(f"{new_item_id} is no available variant of that product")
            found.update(status="exchange requested", exchange=[item_id, new_item_id])
            return "exchange requested"

        def transfer_to_human(reason: Literal["policy", "other"]) -> str:
            """Hand the user over to a human agent."""
            database["transfers"]["1"] = {"reason": reason}
            return "transferred"

        return (find_user_by_email, get_user, get_order, get_product, cancel_order,
                change_address, return_items, exchange_item, transfer_to_human)  # fmt: skip

    def draw(self, rng: random.Random, personality: str) -> tuple[Database, Want]:
        database = _database(rng, self._id_digits)
        user_id = rng.choice(list(database["users"]))
        user = database["users"][user_id]
        kind = "exchange" if personality == "wavering" else rng.choice(self._kinds)
        pending = kind in ("cancel", "address")
        order_id = user["orders"][0 if pending else 1]
        facts = who({"user_id": user_id, **user}, personality)
        facts["order"] = f"It is order {order_id}."
        lookups: list[Call] = [("get_order", {"order_id": order_id})]
        if personality == "forgetful":
            lookups.insert(0, ("find_user_by_email", {"email": user["email"]}))
        want = _want(kind, rng, database, order_id, wavers=personality == "wavering")
        return database, Want(
            goal=want.goal,
            facts={**facts, **want.facts},
            calls=(*lookups, *want.calls),
            required=want.required,
            change=want.change,
        )


def _want(
    kind: str, rng: random.Random, database: Database, order_id: str, *, wavers: bool
) -> Want:
    found = database["orders"][order_id]
    item = rng.choice(found["items"])
    match kind:
        case "cancel":
            reason = rng.choice(["no_longer_needed", "mistake"])
            why = "I no longer need it" if reason == "no_longer_needed" else "I ordered by mistake"
            arguments = {"order_id": order_id, "reason": reason}
            return Want(
                "I want to cancel an order.",
                {"reason": f"The reason: {why}."},
                [("cancel_order", arguments)],
            )
        case "address":
            new = address(rng)
            return Want(
                "My order should go to another address.",
                {"address": f"The new address is {new}."},
                [("change_address", {"order_id": order_id, "new_address": new})],
            )
        case "return":
            refund_to = rng.choice(["original_payment", "gift_card"])
            arguments = {
                "order_id": order_id,
                "item_ids": [item["item_id"]],
                "refund_to": refund_to,
            }
            return Want(
                f"I want to return the {item['product']} of an order, nothing else.",
                {"refund": f"Refund it to the {refund_to.replace('_', ' ')}."},
                [("return_items", arguments)],
            )
        case "exchange":
            variants = database["products"][item["product"]]["variants"]
            others = [i for i, v in variants.items() if v["available"] and i != item["item_id"]]
            first, last = rng.sample(others, 2)
            wish, final = variants[first]["colour"], variants[last]["colour"]
            arguments = {"order_id": order_id, "item_id": item["item_id"], "new_item_id": last}
            return Want(
                f"I want to exchange the {item['product']} of an order for another colour.",
                {"colour": f"I would like it in {wish if wavers else final}."},
                [("get_product", {"product": item["product"]}), ("exchange_item", arguments)],
                change=f"Actually, {final} is nicer. Make it {final}, please." if wavers else "",
            )
        case "denied":
            return Want(
                "I want to cancel an order.",
                {"reason": "The reason: I no longer need it."},
                [("transfer_to_human", {"reason": "policy"})],
            )
        case _:
            return Want(
                "I need to know the total of an order.",
                {},
                [],
                required=(str(found["total"]),),
            )


def _database(rng: random.Random, id_digits: int) -> Database:
    products: dict[str, Any] = {}
    names = rng.sample(PRODUCTS, 3)
    ids = distinct_ids(rng, "i", 15, id_digits)
    for index, name in enumerate(names):
        colours = rng.sample(COLOURS, 5)
        products[name] = {
            "variants": {
                ids[5 * index + at]: {
                    "colour": colour,
                    "price": rng.randint(10, 90),
                    "available": at < 4,
                }
                for at, colour in enumerate(colours)
            }
        }
    users: dict[str, Any] = {}
    orders: dict[str, Any] = {}
    order_ids = distinct_ids(rng, "#W", 4, id_digits)
    for index, person in enumerate(people(rng, 2)):
        owned = order_ids[2 * index : 2 * index + 2]
        for order_id, status in zip(owned, ("pending", "delivered"), strict=True):
            items = [_item(rng, products, name) for name in rng.sample(names, 2)]
            orders[order_id] = {
                "user_id": person["user_id"],
                "status": status,
                "address": address(rng),
                "items": items,
                "total": sum(item["price"] for item in items),
            }
        users[person["user_id"]] = {
            "name": person["name"],
            "email": person["email"],
            "orders": owned,
        }
    return {"users": users, "orders": orders, "products": products, "transfers": {}}


def _item(rng: random.Random, products: dict[str, Any], name: str) -> dict[str, Any]:
    variants = products[name]["variants"]
    item_id = rng.choice([i for i, v in variants.items() if v["available"]])
    return {"item_id": item_id, "product": name, "price": variants[item_id]["price"]}
