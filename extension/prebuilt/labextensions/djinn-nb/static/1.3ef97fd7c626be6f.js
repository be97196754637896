"use strict";(self.rspackChunkdjinn_nb=self.rspackChunkdjinn_nb||[]).push([[1],{21(n,e,r){var o=r(22),i=r.n(o),t=r(23),p=(r.n(t))()(i());p.push([n.id,`/* Colours are the theme's. What a state is, is also said in words or by a shape. */

.jp-Djinn {
  background: var(--jp-layout-color1);
  color: var(--jp-ui-font-color1);
  font-family: var(--jp-ui-font-family);
  font-size: var(--jp-ui-font-size1);
  min-width: 220px;
  overflow-y: auto;
}

.jp-Djinn p,
.jp-Djinn dl,
.jp-Djinn dd,
.jp-Djinn ul,
.jp-Djinn pre {
  margin: 0;
  padding: 0;
}

.jp-Djinn-header {
  align-items: center;
  display: flex;
  gap: 8px;
  justify-content: space-between;
  padding: 8px 12px 4px;
}

.jp-Djinn-title {
  font-size: var(--jp-ui-font-size2);
  font-weight: 600;
  margin: 0;
}

.jp-Djinn-top {
  display: flex;
  flex-direction: column;
  gap: 8px;
  padding: 4px 12px 10px;
}

.jp-Djinn-facts {
  column-gap: 8px;
  display: grid;
  grid-template-columns: max-content minmax(0, 1fr);
  row-gap: 2px;
}

.jp-Djinn-facts dt {
  color: var(--jp-ui-font-color2);
}

.jp-Djinn-facts dd {
  overflow-wrap: anywhere;
}

.jp-Djinn-server {
  display: flex;
  gap: 4px;
}

.jp-Djinn-server > span {
  flex: none;
}

.jp-Djinn-server > .jp-Djinn-address {
  flex: 0 1 auto;
  min-width: 0;
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
}

.jp-Djinn-where {
  border-inline-start: 3px solid var(--jp-border-color1);
  font-weight: 600;
  overflow-wrap: anywhere;
  padding-inline-start: 8px !important;
}

.jp-Djinn-where.jp-mod-stopped {
  border-color: var(--jp-warn-color1);
}

.jp-Djinn-where.jp-mod-running {
  border-color: var(--jp-brand-color1);
}

.jp-Djinn-where.jp-mod-failed {
  border-color: var(--jp-error-color1);
}

.jp-Djinn-busy,
.jp-Djinn-face {
  display: flex;
  flex-direction: column;
  gap: 4px;
}

.jp-Djinn-progress {
  accent-color: var(--jp-brand-color1);
  block-size: 8px;
  inline-size: 100%;
}

/* -- what is wrong, or comes next ---------------------------------------------------------- */

.jp-Djinn-face {
  background: var(--jp-layout-color2);
  border: 1px solid var(--jp-border-color1);
  border-inline-start: 3px solid var(--jp-info-color1);
  border-radius: var(--jp-border-radius);
  overflow-wrap: anywhere;
  padding: 8px;
}

.jp-Djinn-face.jp-mod-warning {
  border-inline-start-color: var(--jp-warn-color1);
}

.jp-Djinn-face.jp-mod-error {
  border-inline-start-color: var(--jp-error-color1);
}

.jp-Djinn-level {
  font-size: var(--jp-ui-font-size0);
  font-weight: 600;
  letter-spacing: 0.04em;
  text-transform: uppercase;
}

.jp-Djinn-text {
  font-weight: 600;
}

.jp-Djinn-buttons {
  display: flex;
  flex-wrap: wrap;
  gap: 6px;
  margin-top: 2px;
}

/* -- sections -------------------------------------------------------------------------------- */

.jp-Djinn-section {
  border-top: 1px solid var(--jp-border-color2);
}

.jp-Djinn-heading {
  align-items: center;
  display: flex;
  font-size: inherit;
  gap: 8px;
  justify-content: space-between;
  margin: 0;
  padding-inline-end: 12px;
}

.jp-Djinn-disclosure {
  align-items: center;
  background: none;
  border: 0;
  color: inherit;
  cursor: pointer;
  display: flex;
  flex: 1;
  font: inherit;
  font-weight: 600;
  gap: 4px;
  padding: 6px 0 6px 8px;
  text-align: start;
}

.jp-Djinn-disclosure > span {
  display: flex;
}

.jp-Djinn-body {
  padding: 0 12px 10px;
}

.jp-Djinn-empty,
.jp-Djinn-note,
.jp-Djinn-amount {
  color: var(--jp-ui-font-color2);
}

.jp-Djinn-note,
.jp-Djinn-amount {
  font-size: var(--jp-ui-font-size0);
  white-space: nowrap;
}

p.jp-Djinn-note,
.jp-Djinn-line.jp-Djinn-note {
  white-space: normal;
}

.jp-Djinn-list {
  display: flex;
  flex-direction: column;
  gap: 2px;
  list-style: none;
}

.jp-Djinn-row {
  align-items: center;
  display: flex;
  gap: 6px;
}

.jp-Djinn-grow {
  flex: 1;
  min-width: 0;
  overflow-wrap: anywhere;
}

label.jp-Djinn-grow {
  align-items: center;
  display: flex;
  gap: 4px;
}

.jp-Djinn-code,
.jp-Djinn-source {
  font-family: var(--jp-code-font-family);
  font-size: var(--jp-code-font-size);
}

/* -- buttons --------------------------------------------------------------------------------- */

.jp-Djinn-button {
  align-items: center;
  background: var(--jp-layout-color1);
  border: 1px solid var(--jp-border-color1);
  border-radius: var(--jp-border-radius);
  color: var(--jp-ui-font-color1);
  cursor: pointer;
  display: inline-flex;
  font: inherit;
  gap: 4px;
  min-height: 24px;
  padding: 2px 10px;
}

.jp-Djinn-button > span {
  display: inline-flex;
}

.jp-Djinn-iconButton {
  align-items: center;
  background: none;
  border: 0;
  border-radius: var(--jp-border-radius);
  cursor: pointer;
  display: inline-flex;
  flex: none;
  justify-content: center;
  min-height: 24px;
  min-width: 24px;
  padding: 2px;
}

.jp-Djinn-iconButton > span {
  display: flex;
}

.jp-Djinn-button:hover:enabled,
.jp-Djinn-iconButton:hover:not([aria-disabled='true']),
.jp-Djinn-layer:hover,
.jp-Djinn-session:hover:enabled,
.jp-Djinn-node:hover:enabled {
  background: var(--jp-layout-color2);
}

.jp-Djinn-button:disabled,
.jp-Djinn-iconButton[aria-disabled='true'] {
  cursor: default;
  opacity: 0.45;
}

.jp-Djinn:focus-visible,
.jp-Djinn button:focus-visible,
.jp-Djinn input:focus-visible,
.jp-Djinn textarea:focus-visible,
.jp-Djinn-source:focus-visible,
.jp-Djinn-banner button:focus-visible,
.jp-Djinn-statusItem:focus-visible {
  outline: 2px solid var(--jp-brand-color1);
  outline-offset: -2px;
}

.jp-Djinn-iconButton svg,
.jp-Djinn-button svg {
  block-size: 16px;
  inline-size: 16px;
}

/* they stay in sight however far down one is */
.jp-Djinn-controls {
  background: var(--jp-layout-color1);
  border-block-end: 1px solid var(--jp-border-color2);
  display: flex;
  flex-wrap: wrap;
  gap: 2px;
  inset-block-start: 0;
  padding: 4px 12px;
  position: sticky;
  z-index: 1;
}

.jp-Djinn-controls + .jp-Djinn-section {
  border-top: 0;
}

/* -- the layer ladder ------------------------------------------------------------------------ */

.jp-Djinn-ladder {
  display: flex;
  flex-direction: column;
  max-height: 42vh;

  /* whole rows of 24px */
  max-height: round(down, 42vh, 24px);
  overflow-y: auto;
}

.jp-Djinn-layer {
  align-items: center;
  background: none;
  border: 0;
  color: inherit;
  cursor: pointer;
  display: flex;
  flex: none;
  font: inherit;
  gap: 6px;
  min-height: 24px;
  padding: 0 6px;
  text-align: start;
}

.jp-Djinn-layer[aria-disabled='true'] {
  cursor: default;
}

.jp-Djinn-layer.jp-mod-here {
  background: var(--jp-layout-color3);
  font-weight: 600;
}

.jp-Djinn-layer .jp-Djinn-note {
  flex: 1;
  overflow: hidden;
  text-overflow: ellipsis;
}

.jp-Djinn-layer.jp-mod-here .jp-Djinn-note {
  color: inherit;
}

.jp-Djinn-number {
  font-variant-numeric: tabular-nums;
  min-width: 2.2em;
  text-align: end;
}

.jp-Djinn-dot {
  block-size: 10px;
  border: 1px solid transparent;
  border-radius: 50%;
  box-sizing: border-box;
  flex: none;
  inline-size: 10px;
}

.jp-Djinn-layer:hover .jp-Djinn-dot.jp-mod-none,
.jp-Djinn-layer:focus-visible .jp-Djinn-dot.jp-mod-none {
  border-color: var(--jp-border-color0);
}

.jp-Djinn-dot.jp-mod-on {
  background: var(--jp-error-color1);
  border-color: var(--jp-error-color1);
}

/* off: a ring; inside the layer: half a disc */
.jp-Djinn-dot.jp-mod-off {
  border: 2px solid var(--jp-error-color1);
}

.jp-Djinn-dot.jp-mod-inside {
  background: linear-gradient(
    90deg,
    var(--jp-error-color1) 50%,
    transparent 50%
  );
  border-color: var(--jp-error-color1);
}

.jp-Djinn-rung {
  align-self: stretch;
  border-inline-start: 2px dotted var(--jp-border-color1);
  flex: none;
  inline-size: 0;
}

.jp-Djinn-layer.jp-mod-executed .jp-Djinn-rung {
  border-inline-start: 4px solid var(--jp-brand-color1);
  margin-inline: -1px;
}

.jp-Djinn-legend {
  color: var(--jp-ui-font-color2);
  display: flex;
  flex-wrap: wrap;
  font-size: var(--jp-ui-font-size0);
  gap: 2px 12px;
  padding-top: 6px !important;
}

.jp-Djinn-legend > span {
  align-items: center;
  display: inline-flex;
  gap: 5px;
}

.jp-Djinn-legend .jp-Djinn-rung {
  align-self: center;
  block-size: 12px;
}

.jp-Djinn-legend .jp-mod-executed {
  border-inline-start: 4px solid var(--jp-brand-color1);
}

/* -- sessions and branches ------------------------------------------------------------------- */

.jp-Djinn-session,
.jp-Djinn-node {
  background: none;
  border: 1px solid transparent;
  border-radius: var(--jp-border-radius);
  color: inherit;
  cursor: pointer;
  font: inherit;
  inline-size: 100%;
  padding: 4px 6px;
  text-align: start;
}

.jp-Djinn-session:disabled,
.jp-Djinn-node:disabled {
  cursor: default;
}

.jp-Djinn-session {
  display: flex;
  flex-direction: column;
  gap: 2px;
}

.jp-Djinn-session > .jp-Djinn-row {
  inline-size: 100%;
}

.jp-Djinn-session.jp-mod-current,
.jp-Djinn-node.jp-mod-current {
  background: var(--jp-layout-color2);
  border-color: var(--jp-border-color1);
}

.jp-Djinn-line {
  overflow-wrap: anywhere;
  padding-inline-start: 16px;
}

.jp-Djinn-node {
  align-items: baseline;
  display: flex;
  gap: 6px;
}

.jp-Djinn-status {
  block-size: 10px;
  border: 2px solid var(--jp-border-color0);
  border-radius: 50%;
  box-sizing: border-box;
  flex: none;
  inline-size: 10px;
}

.jp-Djinn-status.jp-mod-stopped {
  background: var(--jp-warn-color1);
  border-color: var(--jp-warn-color1);
  border-radius: 2px;
}

.jp-Djinn-status.jp-mod-running {
  background: var(--jp-brand-color1);
  border-color: var(--jp-brand-color1);
}

.jp-Djinn-status.jp-mod-failed {
  background: var(--jp-error-color1);
  border-color: var(--jp-error-color1);
}

/* -- memory ---------------------------------------------------------------------------------- */

.jp-Djinn-bar {
  align-items: center;
  column-gap: 8px;
  display: grid;
  grid-template-columns: 4em 1fr max-content;
  padding: 2px 0;
}

.jp-Djinn-track {
  background: var(--jp-layout-color3);
  block-size: 8px;
  border-radius: 4px;
  display: block;
  overflow: hidden;
}

.jp-Djinn-track > span {
  background: var(--jp-brand-color1);
  block-size: 100%;
  display: block;
}

.jp-Djinn-track.jp-mod-full > span {
  background: var(--jp-warn-color1);
}

/* -- forms and code -------------------------------------------------------------------------- */

.jp-Djinn-form {
  display: flex;
  flex-direction: column;
  gap: 6px;
  margin-top: 8px;
}

.jp-Djinn-form > label {
  display: flex;
  flex-direction: column;
  gap: 2px;
}

.jp-Djinn-form input,
.jp-Djinn-form textarea {
  background: var(--jp-input-background);
  border: 1px solid var(--jp-input-border-color);
  border-radius: var(--jp-border-radius);
  box-sizing: border-box;
  color: var(--jp-ui-font-color1);
  font: inherit;
  padding: 4px 6px;
}

.jp-Djinn-form textarea {
  inline-size: 100%;
  resize: vertical;
}

.jp-Djinn-form input[type='number'] {
  inline-size: 6em;
}

.jp-Djinn-action {
  padding: 2px 0 6px;
}

.jp-Djinn-source {
  background: var(--jp-cell-editor-background);
  border: 1px solid var(--jp-border-color2);
  max-height: 8em;
  overflow: auto;
  padding: 4px 6px !important;
  white-space: pre-wrap;
}

/* -- outside the sidebar --------------------------------------------------------------------- */

.jp-Djinn-banner {
  align-items: center;
  background: var(--jp-layout-color2);
  border-bottom: 1px solid var(--jp-border-color1);
  border-inline-start: 3px solid var(--jp-warn-color1);
  color: var(--jp-ui-font-color1);
  box-sizing: border-box;
  display: flex;
  font-size: var(--jp-ui-font-size1);
  gap: 6px;

  /* the layout above a notebook gives a widget what it cannot do without */
  min-height: 36px;
  container-type: inline-size;
  overflow-x: auto;
  padding: 4px 12px;
}

/* where there is no room for words: icons, whose words are read out and in the tooltips */
@container (max-width: 900px) {
  .jp-Djinn-banner .jp-Djinn-button {
    padding: 2px 5px;
  }

  .jp-Djinn-banner .jp-Djinn-buttonLabel {
    block-size: 1px;
    clip-path: inset(50%);
    inline-size: 1px;
    overflow: hidden;
    position: absolute;
    white-space: nowrap;
  }
}

.jp-Djinn-banner .jp-Djinn-button {
  flex: none;
}

.jp-Djinn-banner.lm-mod-hidden {
  display: none;
}

.jp-Djinn-bannerText {
  flex: 1 1 auto;
  font-weight: 600;
  min-width: 8em;
  overflow: hidden;
  text-overflow: ellipsis;
  white-space: nowrap;
}

.jp-Djinn-statusItem {
  align-items: center;
  background: none;
  block-size: 100%;
  border: 0;
  color: inherit;
  cursor: pointer;
  display: flex;
  font: inherit;
  padding: 0 6px;
  white-space: nowrap;
}

.jp-Djinn-statusItem.lm-mod-hidden {
  display: none;
}

/* read out, not seen */
.jp-Djinn-live {
  block-size: 1px;
  clip-path: inset(50%);
  inline-size: 1px;
  inset-block-start: 0;
  overflow: hidden;
  position: fixed;
  white-space: nowrap;
}
`,""]),r.d(e,{},{A:p})},23(n){n.exports=function(n){var e=[];return e.toString=function(){return this.map(function(e){var r="",o=void 0!==e[5];return e[4]&&(r+="@supports (".concat(e[4],") {")),e[2]&&(r+="@media ".concat(e[2]," {")),o&&(r+="@layer".concat(e[5].length>0?" ".concat(e[5]):""," {")),r+=n(e),o&&(r+="}"),e[2]&&(r+="}"),e[4]&&(r+="}"),r}).join("")},e.i=function(n,r,o,i,t){"string"==typeof n&&(n=[[null,n,void 0]]);var p={};if(o)for(var a=0;a<this.length;a++){var l=this[a][0];null!=l&&(p[l]=!0)}for(var s=0;s<n.length;s++){var d=[].concat(n[s]);o&&p[d[0]]||(void 0!==t&&(void 0===d[5]||(d[1]="@layer".concat(d[5].length>0?" ".concat(d[5]):""," {").concat(d[1],"}")),d[5]=t),r&&(d[2]&&(d[1]="@media ".concat(d[2]," {").concat(d[1],"}")),d[2]=r),i&&(d[4]?(d[1]="@supports (".concat(d[4],") {").concat(d[1],"}"),d[4]=i):d[4]="".concat(i)),e.push(d))}},e}},22(n){n.exports=function(n){return n[1]}},15(n){var e=[];function r(n){for(var r=-1,o=0;o<e.length;o++)if(e[o].identifier===n){r=o;break}return r}function o(n,o){for(var i={},t=[],p=0;p<n.length;p++){var a=n[p],l=o.base?a[0]+o.base:a[0],s=i[l]||0,d="".concat(l," ").concat(s);i[l]=s+1;var j=r(d),c={css:a[1],media:a[2],sourceMap:a[3],supports:a[4],layer:a[5]};if(-1!==j)e[j].references++,e[j].updater(c);else{var u=function(n,e){var r=e.domAPI(e);return r.update(n),function(e){e?(e.css!==n.css||e.media!==n.media||e.sourceMap!==n.sourceMap||e.supports!==n.supports||e.layer!==n.layer)&&r.update(n=e):r.remove()}}(c,o);o.byIndex=p,e.splice(p,0,{identifier:d,updater:u,references:1})}t.push(d)}return t}n.exports=function(n,i){var t=o(n=n||[],i=i||{});return function(n){n=n||[];for(var p=0;p<t.length;p++){var a=r(t[p]);e[a].references--}for(var l=o(n,i),s=0;s<t.length;s++){var d=r(t[s]);0===e[d].references&&(e[d].updater(),e.splice(d,1))}t=l}}},17(n){var e={};n.exports=function(n,r){var o=function(n){if(void 0===e[n]){var r=document.querySelector(n);if(window.HTMLIFrameElement&&r instanceof window.HTMLIFrameElement)try{r=r.contentDocument.head}catch(n){r=null}e[n]=r}return e[n]}(n);if(!o)throw Error("Couldn't find a style target. This probably means that the value for the 'insert' parameter is invalid.");o.appendChild(r)}},19(n){n.exports=function(n){var e=document.createElement("style");return n.setAttributes(e,n.attributes),n.insert(e,n.options),e}},18(n,e,r){n.exports=function(n){var e=r.nc;e&&n.setAttribute("nonce",e)}},16(n){n.exports=function(n){if("u"<typeof document)return{update:function(){},remove:function(){}};var e=n.insertStyleElement(n);return{update:function(r){var o,i,t;o="",r.supports&&(o+="@supports (".concat(r.supports,") {")),r.media&&(o+="@media ".concat(r.media," {")),(i=void 0!==r.layer)&&(o+="@layer".concat(r.layer.length>0?" ".concat(r.layer):""," {")),o+=r.css,i&&(o+="}"),r.media&&(o+="}"),r.supports&&(o+="}"),(t=r.sourceMap)&&"u">typeof btoa&&(o+="\n/*# sourceMappingURL=data:application/json;base64,".concat(btoa(unescape(encodeURIComponent(JSON.stringify(t))))," */")),n.styleTagTransform(o,e,n.options)},remove:function(){var n;null===(n=e).parentNode||n.parentNode.removeChild(n)}}}},20(n){n.exports=function(n,e){if(e.styleSheet)e.styleSheet.cssText=n;else{for(;e.firstChild;)e.removeChild(e.firstChild);e.appendChild(document.createTextNode(n))}}},14(n,e,r){var o=r(15),i=r.n(o),t=r(16),p=r.n(t),a=r(17),l=r.n(a),s=r(18),d=r.n(s),j=r(19),c=r.n(j),u=r(20),f=r.n(u),x=r(21),b={};b.styleTagTransform=f(),b.setAttributes=d(),b.insert=l().bind(null,"head"),b.domAPI=p(),b.insertStyleElement=c(),i()(x.A,b),x.A&&x.A.locals&&x.A.locals}}]);