"""What drafts are measured on: beginnings of programs, a program to edit, and ten texts of different kinds."""

from __future__ import annotations

CODE = [
    'def quicksort(items):\n    """Sort a list of numbers with quicksort, returning a new list."""\n',
    'class Stack:\n    """A stack with push, pop, peek and is_empty."""\n\n    def __init__(self):\n',
    'import csv\n\n\ndef read_rows(path):\n    """Read a CSV file and return a list of dictionaries."""\n',
    "// Returns true if n is prime.\nfunction isPrime(n) {\n",
]

PROGRAM = '''import json
from pathlib import Path


class Inventory:
    """Items and how many of each there are, kept in a JSON file."""

    def __init__(self, path):
        self.path = Path(path)
        self.items = {}
        if self.path.exists():
            self.items = json.loads(self.path.read_text())

    def add(self, name, count=1):
        if count < 1:
            raise ValueError("count must be at least 1")
        self.items[name] = self.items.get(name, 0) + count
        self.save()

    def remove(self, name, count=1):
        if self.items.get(name, 0) < count:
            raise KeyError(f"there are not {count} of {name}")
        self.items[name] -= count
        if self.items[name] == 0:
            del self.items[name]
        self.save()

    def save(self):
        self.path.write_text(json.dumps(self.items, indent=2))
'''

EDIT = [
    f"```python\n{PROGRAM}```\n\nThe same program, with {change}:\n\n```python\n"
    for change in (
        "the class renamed to `Stock` and everything else kept as it is",
        "type hints added to the arguments of every method",
    )
]

MIXED = [
    CODE[0],
    EDIT[0],
    "The history of the lighthouse begins long before electricity. ",
    "Question: Why is the sky blue?\nAnswer:",
    "Dear Ms. Alvarez,\n\nThank you for your letter of 3 May. I am writing to",
    "1, 4, 9, 16, 25, 36,",
    "name,age,city\nAnna,31,Oslo\nBen,45,Lima\n",
    "SELECT customers.name, SUM(orders.total)\nFROM customers\n",
    "Il était une fois, dans un petit village au bord de la mer,",
    "The sea was wild that night,\nand the wind",
]
