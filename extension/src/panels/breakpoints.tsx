// The breakpoints of the session, and of the runs that follow.
import * as React from 'react';
import { clearIcon, closeIcon } from '@jupyterlab/ui-components';
import { breakpointText } from '../model';
import type { PartProps } from './parts';
import { IconButton, can } from './parts';

export function Breakpoints(props: PartProps): React.ReactElement {
  const { trans, view, perform } = props;
  const snapshot = view.snapshot;
  const points = snapshot?.breakpoints ?? [];
  const known = new Set(points.map(one => one.location));
  const pending = (snapshot?.pending ?? []).filter(
    one => !known.has(one.location)
  );
  if (points.length === 0 && pending.length === 0) {
    return (
      <p className="jp-Djinn-empty">
        {snapshot?.model
          ? trans.__('No breakpoints. Click a layer to stop after it.')
          : trans.__('No breakpoints.')}
      </p>
    );
  }
  return (
    <>
      <ul className="jp-Djinn-list">
        {points.map(one => (
          <li key={one.id} className="jp-Djinn-row">
            <label className="jp-Djinn-grow">
              <input
                type="checkbox"
                checked={one.enabled}
                disabled={!can(view, 'enable_breakpoint')}
                onChange={event => {
                  void perform('enable_breakpoint', {
                    id: one.id,
                    enabled: event.target.checked
                  });
                }}
              />
              <span className="jp-Djinn-code">
                {breakpointText(one, trans)}
              </span>
            </label>
            <span className="jp-Djinn-note">
              {one.kind === 'breakpoint' ? '' : `${one.kind} · `}
              {trans._n('%1 hit', '%1 hits', one.hits)}
            </span>
            <IconButton
              icon={closeIcon}
              label={trans.__('Remove breakpoint at %1', one.location)}
              disabled={!can(view, 'remove_breakpoint')}
              onClick={() => {
                void perform('remove_breakpoint', { id: one.id });
              }}
            />
          </li>
        ))}
        {pending.map(one => (
          <li key={breakpointText(one, trans)} className="jp-Djinn-row">
            <span className="jp-Djinn-grow jp-Djinn-code">
              {breakpointText(one, trans)}
            </span>
            <span className="jp-Djinn-note">{trans.__('runs to come')}</span>
          </li>
        ))}
      </ul>
      <button
        type="button"
        className="jp-Djinn-button"
        disabled={!can(view, 'clear_breakpoints')}
        onClick={() => {
          void perform('clear_breakpoints');
        }}
      >
        <clearIcon.react tag="span" aria-hidden="true" />
        {trans.__('Remove all')}
      </button>
    </>
  );
}
