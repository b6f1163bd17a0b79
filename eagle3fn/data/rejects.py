class Rejects:
    def __init__(self, path=None, limit=None):
        self.path = path
        self.limit = limit
        self.count = 0
        self.first = []

    def add(self, where, reason, value, rows):
        self.count += 1
        self.first.append(f"{where}: {reason}")

    def finish(self, name, rows):
        from eagle3fn.base.errors import UserError

        if self.count and self.limit is None:
            raise UserError(
                f"{name}: {self.count} of {rows} rows are bad: " + "; ".join(self.first[:5])
            )


from collections import Counter


class Dropped(Counter):
    def describe(self):
        return ", ".join(f"{n} {r}" for r, n in self.most_common())
