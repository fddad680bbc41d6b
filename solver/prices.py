"""What one demand costs, by node and by price: kept up to date by a `Ranking`, read by whoever answers for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

Names = dict[str, None]
"""A set that keeps its order."""


class Prices:
    """The nodes that can take a demand, each with its total price. Do not change what it hands out."""

    __slots__ = ("_by_name", "_by_price", "_order")

    def __init__(self, prices: Mapping[str, int] | None = None) -> None:
        self._by_name: dict[str, int] = {}
        self._by_price: dict[int, Names] = {}
        self._order: list[int] | None = None
        if prices:
            self.fill(prices.items())

    @property
    def by_name(self) -> Mapping[str, int]:
        """Each node with its price."""
        return self._by_name

    def fill(self, prices: Iterable[tuple[str, int]]) -> None:
        """These, and no others."""
        self._by_name = dict(prices)
        self._by_price = {}
        for name, price in self._by_name.items():
            if price in self._by_price:
                self._by_price[price][name] = None
            else:
                self._by_price[price] = {name: None}
        self._order = None

    def put(self, name: str, price: int | None) -> None:
        """The node now costs that; None: it cannot take the demand."""
        before = self._by_name.get(name)
        if before == price:
            return
        if before is not None:
            of_price = self._by_price[before]
            del of_price[name]
            if not of_price:
                del self._by_price[before]
                self._order = None
        if price is None:
            del self._by_name[name]
            return
        self._by_name[name] = price
        if price in self._by_price:
            self._by_price[price][name] = None
        else:
            self._by_price[price] = {name: None}
            self._order = None

    def clear(self) -> None:
        """Forget all, to give back the memory."""
        self.fill(())

    def cheapest_first(self) -> Iterator[tuple[int, Collection[str]]]:
        """The different prices, from the least, with the nodes that have them."""
        if self._order is None:
            self._order = sorted(self._by_price)
        for price in self._order:
            yield price, self._by_price[price].keys()
