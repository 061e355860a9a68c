{{/* The learner's claim for checkpoints and archive: always there, for a claim template cannot be
     added to a StatefulSet later. */}}
{{- define "lagwise.learnerClaims" -}}
{{- $storage := .Values.learner.storage -}}
{{- if not $storage.existingClaim -}}
volumeClaimTemplates:
  - metadata:
      name: run-data
      labels:
        {{- include "lagwise.selectorLabels" (dict "root" . "role" "learner") | nindent 8 }}
    spec:
      accessModes: [ReadWriteOnce]
      {{- with $storage.className }}
      storageClassName: {{ . }}
      {{- end }}
      resources:
        requests:
          storage: {{ $storage.size }}
{{- end -}}
{{- end -}}
