// The model's layer ladder: a click sets or removes a breakpoint after a layer.
import * as React from 'react';
import type { Asked, LadderRow } from '../model';
import { ladder, rowName, stillAsked } from '../model';
import type { PartProps } from './parts';
import { can } from './parts';

/** The first row is the one that the tab key reaches when nothing is chosen. */
function reachable(rows: readonly LadderRow[], at: number | null): number {
  return at ?? rows.find(row => row.here || row.selected)?.layer ?? 0;
}

export function Layers(props: PartProps): React.ReactElement {
  const { trans, view } = props;
  const snapshot = view.snapshot;
  const [asked, setAsked] = React.useState<Asked>(new Map());
  const [at, setAt] = React.useState<number | null>(null);
  const list = React.useRef<HTMLDivElement>(null);
  const waiting = stillAsked(snapshot, asked);
  const rows = ladder(snapshot, waiting);
  const here = rows.find(row => row.here)?.layer ?? null;

  React.useEffect(() => {
    if (here !== null) {
      // the ladder alone scrolls, never the sidebar under the pointer
      const ladder = list.current;
      const rung = ladder?.children[here] as HTMLElement | undefined;
      if (ladder && rung) {
        const top = rung.offsetTop - ladder.offsetTop;
        // by whole rows, so that none is cut
        const rows = Math.round(
          (top - ladder.clientHeight / 2) / rung.offsetHeight
        );
        ladder.scrollTop = rows * rung.offsetHeight;
      }
    }
  }, [here]);

  if (rows.length === 0) {
    return (
      <p className="jp-Djinn-empty">
        {trans.__('The layers are listed here once a server is connected.')}
      </p>
    );
  }
  const tabStop = reachable(rows, at);
  const isPossible = can(view, 'toggle_breakpoint');

  const toggle = (row: LadderRow) => {
    if (!isPossible) {
      return;
    }
    const wish = row.mark === 'none' || row.mark === 'inside';
    setAsked(new Map(waiting).set(row.layer, wish));
    const forget = () =>
      setAsked(now => {
        const rest = new Map(now);
        rest.delete(row.layer);
        return rest;
      });
    // the snapshot that shows it comes before the answer, or soon after it
    void props
      .perform('toggle_breakpoint', { location: row.location })
      .then(ok => (ok ? window.setTimeout(forget, 1500) : forget()));
  };

  const move = (event: React.KeyboardEvent, from: number) => {
    const last = rows.length - 1;
    const next: Record<string, number> = {
      ArrowDown: Math.min(last, from + 1),
      ArrowUp: Math.max(0, from - 1),
      Home: 0,
      End: last
    };
    const to = next[event.key];
    if (to !== undefined) {
      event.preventDefault();
      event.stopPropagation();
      setAt(to);
      (list.current?.children[to] as HTMLElement | undefined)?.focus();
    }
  };

  return (
    <>
      <div
        ref={list}
        className="jp-Djinn-ladder"
        role="group"
        aria-label={trans.__('layers; a click sets or removes a breakpoint')}
      >
        {rows.map(row => (
          <button
            key={row.layer}
            type="button"
            className={[
              'jp-Djinn-layer',
              row.here ? 'jp-mod-here' : '',
              row.executed ? 'jp-mod-executed' : ''
            ].join(' ')}
            aria-label={rowName(row, trans)}
            aria-pressed={row.mark === 'on'}
            aria-current={row.here ? 'true' : undefined}
            aria-disabled={!isPossible}
            title={rowName(row, trans)}
            tabIndex={row.layer === tabStop ? 0 : -1}
            onClick={() => toggle(row)}
            onFocus={() => setAt(row.layer)}
            onKeyDown={event => move(event, row.layer)}
          >
            <span
              className={`jp-Djinn-dot jp-mod-${row.mark}`}
              aria-hidden="true"
            />
            <span className="jp-Djinn-number">{row.layer}</span>
            <span className="jp-Djinn-rung" aria-hidden="true" />
            <span className="jp-Djinn-note">
              {row.here
                ? trans.__('stopped')
                : row.condition
                  ? trans.__('if %1', row.condition)
                  : row.pending
                    ? trans.__('next run')
                    : ''}
            </span>
          </button>
        ))}
      </div>
      <p className="jp-Djinn-note jp-Djinn-legend">
        <span>
          <span className="jp-Djinn-dot jp-mod-on" aria-hidden="true" />
          {trans.__('breakpoint')}
        </span>
        <span>
          <span className="jp-Djinn-rung jp-mod-executed" aria-hidden="true" />
          {trans.__('has run')}
        </span>
        <span>
          <span className="jp-Djinn-rung" aria-hidden="true" />
          {trans.__('not run')}
        </span>
      </p>
    </>
  );
}
