"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
window.viewers = data.pair
  ? graphPair([byId("before"), byId("after")], data.pair)
  : [graphViewer(byId("graph"), data.graph)];
