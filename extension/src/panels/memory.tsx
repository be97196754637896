// Where the KV pages are: a bar per tier, and the newest swaps.
import * as React from 'react';
import { bars } from '../model';
import type { PartProps } from './parts';

export function Memory(props: PartProps): React.ReactElement {
  const { trans, view } = props;
  const memory = view.snapshot?.memory ?? null;
  const found = bars(memory, trans);
  if (found.length === 0) {
    return (
      <p className="jp-Djinn-empty">
        {trans.__(
          'How full the tiers are is shown once a server is connected.'
        )}
      </p>
    );
  }
  const swap = memory?.swaps[memory.swaps.length - 1];
  return (
    <>
      {found.map(bar => (
        <div key={bar.tier} className="jp-Djinn-bar">
          <span className="jp-Djinn-tier">{bar.label}</span>
          <span
            className={`jp-Djinn-track ${bar.share > 0.9 ? 'jp-mod-full' : ''}`}
            role="meter"
            aria-label={trans.__('KV pages on the %1', bar.label)}
            aria-valuemin={0}
            aria-valuemax={100}
            aria-valuenow={Math.round(100 * bar.share)}
            aria-valuetext={bar.text}
          >
            <span style={{ inlineSize: `${100 * bar.share}%` }} />
          </span>
          <span className="jp-Djinn-amount">{bar.text}</span>
        </div>
      ))}
      <p className="jp-Djinn-note">
        {swap
          ? trans.__('last swap: %1', swap.text)
          : trans.__('KV pages in use; no swaps so far')}
      </p>
    </>
  );
}
